"""SeRA once more, as slowly and plainly as possible: the oracle of test_oracle.py.

It imports nothing of the project. One sequence at a time through `model(input_ids).logits`, in float64; no padding,
no batches, no key-value caches; every log-probability is computed anew wherever it is needed, but those under π_ref,
which never changes. Only what is drawn comes from outside: the order of the pairs in every epoch, the samples, and the
numbers by which the random control chooses.

    settings    a dict of the run's flags, all given
    rows        D, dicts of the texts prompt, chosen, rejected; held_out: the same, to evaluate on
    drawn       permutations: a list of index lists, one an epoch, of all iterations in their order
                numbers: a list of lists of floats, one a random choice, in their order
                samples: iteration -> prompt's number in D -> a list of (text, whether it ended)
                answers: iteration -> a list of (prompt, text, whether it ended), of every evaluation
"""

import copy
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def token_logps(policy, x, y):
    """log π(y_i | x, y_<i), nats, of one response: (|y|,)."""
    logits = policy(input_ids=torch.tensor([x + y])).logits[0]  # (T, V)
    logps = logits[len(x) - 1 : -1].log_softmax(-1)  # (|y|, V): a position predicts the token after it
    return logps[range(len(y)), y]


class NaiveSera:
    def __init__(self, folder, rows, held_out, settings, drawn):
        self.settings, self.drawn = settings, drawn
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pairs = [self.encode(row) for row in rows]
        self.held_out = [self.encode(row) for row in held_out]
        self.policies = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()]  # θ_0 = π_ref
        self.of_reference = {}  # log π_ref(y|x), by x and y
        self.evaluations, self.steps = [self.evaluate(0)], []
        self.trained_on, self.dropped, self.sample_rewards = {}, {}, {}  # by iteration
        for t in range(1, settings["iterations"] + 1):
            everything = [(*pair, 0.0, "offline") for pair in self.pairs]
            self.trained_on[t] = everything if t == 1 else self.select(t) + self.bootstrap(t)
            self.train(t)
            self.evaluations.append(self.evaluate(t))

    def encode(self, row):
        end = [self.tokenizer.eos_token_id]
        x, w, l = (self.tokenizer(row[name]).input_ids for name in ("prompt", "chosen", "rejected"))
        return x, w + end, l + end

    # The reward and the loss

    def reward(self, i, x, y):
        """r_i(x,y) = log π_θi(y|x) − log π_ref(y|x); per token under IPO; log π_θi(y|x)/|y| under SimPO."""
        loss = self.settings["loss_type"]
        logp = token_logps(self.policies[i], x, y).sum()
        if loss == "simpo":
            return logp / len(y)
        reference = self.reference(x, y)
        return (logp - reference) / len(y) if loss == "ipo" else logp - reference

    def reference(self, x, y):
        """log π_ref(y|x)."""
        key = str((x, y))
        if key not in self.of_reference:
            with torch.no_grad():
                self.of_reference[key] = token_logps(self.policies[0], x, y).sum()
        return self.of_reference[key]

    def loss(self, margin):
        name, beta, eps = (self.settings[key] for key in ("loss_type", "beta", "label_smoothing"))
        if name in ("dpo", "robust"):
            likely = 1 / (1 + torch.exp(-beta * margin))
            right, flipped = -torch.log(likely), -torch.log(1 - likely)
            if name == "robust":
                return ((1 - eps) * right - eps * flipped) / (1 - 2 * eps)
            return (1 - eps) * right + eps * flipped
        if name == "ipo":
            return (margin - 1 / (2 * beta)) ** 2
        if name == "slic":
            return torch.clamp(1 - beta * margin, min=0)
        return -torch.log(1 / (1 + torch.exp(-(beta * margin - beta / 2))))  # simpo, γ = β/2

    def averaged_reward(self, t, x, y):
        """r̄_t = (1−γ) r_{t−1} + γ r_{t−2}; at t = 2 there is only θ_1."""
        with torch.no_grad():
            newest = self.reward(t - 1, x, y).item()
            if t == 2:
                return newest
            gamma = self.settings["ensemble_gamma"]
            return (1 - gamma) * newest + gamma * self.reward(t - 2, x, y).item()

    # The review

    def choose(self, margins, count):
        """The numbers of the `count` widest, widest first; of the random control those whose drawn number is largest."""
        by = self.drawn["numbers"].pop(0) if self.settings["select"] == "random" else margins
        return sorted(range(len(margins)), key=lambda i: -by[i])[:count]

    def without_length(self, groups):
        """[[(reward or None, length)]] a prompt -> rewards less slope·length, the slope by least squares in prompts."""
        up, down = 0.0, 0.0
        for group in groups:
            known = [(r, n) for r, n in group if r is not None]
            if known:
                mean_r, mean_n = (sum(column) / len(known) for column in zip(*known))
                up += sum((r - mean_r) * (n - mean_n) for r, n in known)
                down += sum((n - mean_n) ** 2 for _, n in known)
        slope = up / down if self.settings["length_free"] else 0.0
        return [[None if r is None else r - slope * n for r, n in group] for group in groups]

    def select(self, t):
        """The K pairs of D with the largest margin."""
        groups = [[(self.averaged_reward(t, x, y), len(y)) for y in both] for x, *both in self.pairs]
        margins = [r_w - r_l for r_w, r_l in self.without_length(groups)]
        kept = self.choose(margins, round(self.settings["keep"] * len(self.pairs)))
        left = sorted(set(range(len(self.pairs))) - set(kept), key=lambda i: margins[i])  # most distrusted first
        self.dropped[t] = [(*self.pairs[i], margins[i], "offline") for i in left]
        return [(*self.pairs[i], margins[i], "offline") for i in kept]

    def bootstrap(self, t):
        """Of every prompt's samples the best against the worst, and of these pairs the K̃ with the largest margin."""
        wanted = round(self.settings["bootstrap"] * len(self.pairs))
        if wanted == 0:
            return []
        with torch.no_grad():
            least = sorted(token_logps(self.policies[0], x, y).min().item() for x, *both in self.pairs for y in both)
        floor = least[int(self.settings["token_floor"] * len(least))] if self.settings["token_floor"] else -math.inf
        groups = []
        for (x, _, _), texts in zip(self.pairs, self.drawn["samples"][t], strict=True):
            groups.append([])
            for text, ended in texts:
                y = self.tokenizer(text).input_ids + [self.tokenizer.eos_token_id] * ended
                with torch.no_grad():
                    likely = ended and token_logps(self.policies[0], x, y).min().item() >= floor
                groups[-1].append((y, self.averaged_reward(t, x, y) if likely else None))
        rewards = self.without_length([[(r, len(y)) for y, r in group] for group in groups])
        self.sample_rewards[t] = rewards
        found = []
        for (x, _, _), group, values in zip(self.pairs, groups, rewards):
            scored = [(r, y) for (y, _), r in zip(group, values) if r is not None]
            if scored:
                (high, best), (low, worst) = (f(scored, key=lambda one: one[0]) for f in (max, min))
                if best != worst:
                    found.append((x, best, worst, high - low, "bootstrap"))
        return [found[i] for i in self.choose([pair[3] for pair in found], wanted)]

    # Training and evaluation

    def train(self, t):
        """One epoch or more over the pairs from θ_{t−1}: AdamW without decay, linear warm-up and decay, clipping at 1."""
        pairs, size = self.trained_on[t], self.settings["per_device_train_batch_size"]
        batches = []
        for _ in range(self.settings["epochs_per_iteration"]):
            order = self.drawn["permutations"].pop(0)
            assert sorted(order) == list(range(len(pairs)))
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        self.policies.append(copy.deepcopy(self.policies[-1]))
        parameters = list(self.policies[t].parameters())
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        warm_up = math.ceil(0.1 * len(batches))
        for step, batch in enumerate(batches):
            rising, falling = (step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1)
            rate = self.settings["learning_rate"] * min(rising, falling)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            measured = self.measure(t, [pairs[i][:3] for i in batch], backward=True)
            norm = math.sqrt(sum((p.grad**2).sum().item() for p in parameters))
            for p in parameters:
                p.grad *= min(1.0, 1.0 / norm)
            optimizer.step()
            self.steps.append({"iteration": t, "step": step + 1, "learning_rate": rate, "grad_norm": norm, **measured})

    def evaluate(self, t):
        with torch.no_grad():
            measured = self.measure(t, self.held_out)
            kl = [token_logps(self.policies[t], x, y).sum() - self.reference(x, y) for x, y in self.answers(t)]
        shown = {f"eval_{name}": measured[name] for name in ("loss", "rewards/accuracies", "rewards/margins")}
        return {**shown, "kl": sum(kl).item() / len(kl)}

    def answers(self, t):
        end = [self.tokenizer.eos_token_id]
        return [(self.tokenizer(x).input_ids, self.tokenizer(y).input_ids + end * ended)
                for x, y, ended in self.drawn["answers"][t]]  # fmt: skip

    def measure(self, t, pairs, backward=False):
        """The mean loss of the pairs and TRL's other figures under θ_t; with `backward`, the mean's gradient."""
        beta, sums = self.settings["beta"], {}
        for x, w, l in pairs:
            r_w, r_l = self.reward(t, x, w), self.reward(t, x, l)
            loss = self.loss(r_w - r_l)
            if backward:
                (loss / len(pairs)).backward()
            margin = r_w.item() - r_l.item()
            right = 1.0 if margin > 1e-9 else 0.0 if margin < -1e-9 else 0.5
            with torch.no_grad():
                log_w, log_l = (token_logps(self.policies[t], x, y).sum().item() for y in (w, l))
            for name, value in {
                "loss": loss.item(), "rewards/chosen": beta * r_w.item(), "rewards/rejected": beta * r_l.item(),
                "rewards/accuracies": right, "rewards/margins": beta * margin, "logps/chosen": log_w,
                "logps/rejected": log_l,
            }.items():  # fmt: skip
                sums[name] = sums.get(name, 0.0) + value / len(pairs)
        return sums
