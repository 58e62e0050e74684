"""SeRA among its neighbours: related methods, each as the few lines in which it differs, in one loop and one world.

    python experiments/neighbours.py          45 minutes on two idle cores; stopped, it goes on
    python experiments/neighbours.py --quick  one seed, small: does it all still run? It writes nothing

Every method is one function. It returns the functions that replace train.py's: pairs(run, t) makes the training set of
iteration t (for `all_pairs` and `review`); some replace `pair_losses` or `backward` too. All else is SeRA's loop in the
playground, whose true reward is known, with the reference π_θ0 unless the docstring says another, and claims.py's
comparison: equal optimizer steps (not epochs), one grid of β, tuned on validation prompts at 30 % flipped labels. Paper
and code were read where a docstring says "and its code"; elsewhere it says what was read. No number here says how good
a method is on its own task. Outside of such a loop are Linear Alignment (arXiv:2401.11458: only decoding changes) and
ABR (offline reinforcement learning of control). Writes results/neighbours.json, .png and experiments/README.md.
"""

import argparse
import copy
import functools
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import claims
import torch
import torch.nn.functional as F
from distrust import README, filled
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import train
from sera_min import folder, logprobs, playground
from sera_min.bootstrap import best_worst_pairs, sample_responses
from sera_min.config import seed_of
from sera_min.pairs import Ids, Pair, Review, Samples, TrainingSet, rows_of
from sera_min.run import Run
from train import all_pairs

TOKENIZER = playground.make_tokenizer()
Changes = dict[str, Callable]
text = functools.partial(TOKENIZER.decode, skip_special_tokens=True)  # Ids -> str


def ids(y: str) -> Ids:
    return TOKENIZER(y + " <eos>").input_ids


def true_reward(x: Ids, y: Ids) -> float:
    return playground.true_reward(text(x), text(y))


def to_train_on(run: Run, t: int, pairs: list[Pair], against: int = 0) -> Review:
    """These N pairs, and as π_ref the policy of iteration `against`."""
    reference = run.log_prob(against, *rows_of(pairs), f"pairs-{t}")[:, 0].view(-1, 2)
    return Review(TrainingSet(pairs, reference, torch.zeros(len(pairs)), ["own"] * len(pairs), [0] * len(pairs)))


def ranked(run: Run, t: int, against: int, count: int | None = None) -> Samples:
    """n samples of each of the first `count` prompts from π_θ(t−1); rewards: log π_θ(t−1) − log π_θ`against`."""

    def reward(x: list[Ids], y: list[Ids], what: str) -> tuple[Tensor, Tensor, Tensor]:
        newest, reference = (run.log_prob(i, x, y, what) for i in (t - 1, against))
        return newest[:, 0] - reference[:, 0], reference[:, 0], reference[:, 1]

    return train.rank_samples(t, [x for x, _, _ in run.offline[:count]], run.sample, reward, -math.inf, run.config)


def best_and_worst(run: Run, samples: Samples, rewards: Tensor) -> tuple[list[Pair], Tensor]:
    """The pairs that these rewards (P, n) make of the samples, with their margins."""
    y = samples.responses
    triples, margins, _ = best_worst_pairs(rewards.tolist(), samples.ended.tolist(), y, samples.usable.tolist())
    return [Pair(run.offline[i].prompt, y[i][best], y[i][worst]) for i, best, worst in triples], margins


def rad(judged: bool) -> Changes:
    """RAD, reward-augmented data (arXiv:2410.08067 and its code). Each pair is two, under prompts that name a score g:

        −log σ(βm(y_w, y_l | x, g_w)) − log σ(βm(y_l, y_w | x, g_l)),    answered under the highest g
    So the label does not matter. g is a fifth of the responses, by true reward (judged), or by r_(t−1), from t = 2 on.
    It stands in the place of the prompt's first four words; the highest leaves them. Pairs of one g are dropped.
    """
    starts = [TOKENIZER(x).input_ids for x in ("and " * 4, "the " * 4, "about " * 4, "me " * 4, "tell me about the")]

    def pairs(run: Run, t: int) -> Review:
        x, y = rows_of(run.offline)
        if judged:
            scores = torch.tensor([true_reward(*row) for row in zip(x, y)])  # (2|D|,)
        elif t > 1:
            scores = run.log_prob(t - 1, x, y, "pairs")[:, 0] - run.log_prob(0, x, y, "pairs")[:, 0]
        else:
            return all_pairs(run)
        fifths = torch.bucketize(scores, scores.quantile(torch.arange(1, 5) / 5), right=True).view(-1, 2).tolist()
        made = []
        for (x, w, l), (g_w, g_l) in zip(run.offline, fifths):
            made += [Pair(starts[g_w] + x[4:], w, l), Pair(starts[g_l] + x[4:], l, w)] if g_w != g_l else []
        return to_train_on(run, t, made)

    return {"pairs": pairs}


def spo(gamma: float = 0.1, degrees: int = 4) -> Changes:
    """SPO, preference degree (arXiv:2409.17791: abstract read). The loss, and beside it a classifier's:

        −log σ(βm) + γ·CE(W h, k),    h: mean hidden state of y_w without k/3 of its key words
    Assumed: γ = 0.1, k = 0 … 3 at random, a linear W with its own Adam; key words: all but D's 6 most frequent.
    """
    rng, frequent, W = random.Random(), set[int](), torch.zeros(degrees, 64, requires_grad=True)
    optimizer = torch.optim.Adam([W], 1e-3)

    def pairs(run: Run, t: int) -> Review:
        rng.seed(f"{run.config.seed} {t}")
        counts = Counter(token for pair in run.offline for token in pair.chosen + pair.rejected)
        frequent.update(token for token, _ in counts.most_common(6))
        return all_pairs(run)

    def backward(policy, pairs: list[Pair], reference, b: int, *others, plain=train.backward) -> list[Tensor]:
        k = [rng.randrange(degrees) for _ in pairs]
        y = [without_key_words(pair.chosen, frequent, n / (degrees - 1), rng) for pair, n in zip(pairs, k)]
        rows = pad_sequence([torch.tensor(pair.prompt + less) for pair, less in zip(pairs, y)], batch_first=True)
        hidden = logprobs.body_of(policy)(input_ids=rows).last_hidden_state  # (m, T, 64)
        h = [of[len(x) : len(x) + len(less)].mean(0) for of, (x, _, _), less in zip(hidden, pairs, y)]
        (gamma * F.cross_entropy(torch.stack(h) @ W.T, torch.tensor(k), reduction="sum") / b).backward()
        optimizer.step()
        optimizer.zero_grad()
        return plain(policy, pairs, reference, b, *others)

    return {"pairs": pairs, "backward": backward}


def without_key_words(y: Ids, frequent: set[int], share: float, rng: random.Random) -> Ids:
    key = [i for i, token in enumerate(y) if token not in frequent]
    gone = rng.sample(key, round(share * len(key)))
    return [token for i, token in enumerate(y) if i not in gone]


def bmc(delta: float = 2.0) -> Changes:
    """BMC, bridging and modelling correlations (arXiv:2408.07471 and its code). Pairs that are close, tokens weighed:

        m = Σ_i w_i r(ỹ_i) − Σ_i w_i r(y_l,i),    w_i = 1 + min(1/π_θ(y_i), δ) where the two differ, else 1
    ỹ is y_l, its worst sentence replaced by the best of y_w; a pair whose ỹ is not better than y_l is dropped. Their
    editor is GPT-4, ours knows the sentences' scores: no wrong label is left. w has no gradient; π_θ's weighs log π_ref
    too, as notes of the paper say (their code has π_ref's there).
    """
    reference: list = []

    def pairs(run: Run, t: int) -> Review:
        reference[:] = [folder.load(run.policies.folder(0), "cpu")[0].eval()]
        edited = [Pair(x, ids(mend(text(x), text(w), text(l))), l) for x, w, l in run.offline]
        return to_train_on(run, t, [Pair(x, w, l) for x, w, l in edited if true_reward(x, w) > true_reward(x, l)])

    def backward(policy, pairs: list[Pair], _, b: int, config, max_tokens: int) -> list[Tensor]:
        logps = logprobs.token_logprobs(policy, *rows_of(pairs))
        with torch.no_grad():
            before = logprobs.token_logprobs(reference[0], *rows_of(pairs))
        both = [ys for _, w, l in pairs for ys in ((w, l), (l, w))]  # a response, and what it is compared with
        r = [(confidence(p, y, other, delta) * (p - p_ref)).sum() for p, p_ref, (y, other) in zip(logps, before, both)]
        by_pair = torch.stack(r).view(-1, 2)
        (train.pair_losses(by_pair, config).sum() / b).backward()
        return [by_pair.detach(), torch.stack([p.detach().sum() for p in logps]).view(-1, 2)]

    return {"pairs": pairs, "backward": backward}


def mend(x: str, better: str, worse: str) -> str:
    """The worse response, its worst sentence replaced by the best one of the better."""
    good, bad = ([f"{s.strip()} ." for s in y.removesuffix(".").split(".")] for y in (better, worse))
    score = functools.partial(playground.true_reward, x)
    bad[bad.index(min(bad, key=score))] = max(good, key=score)
    return " ".join(bad)


def confidence(logps: Tensor, y: Ids, other: Ids, delta: float) -> Tensor:
    differs = torch.tensor([i >= len(other) or token != other[i] for i, token in enumerate(y)])  # place by place
    return 1 + differs * (-logps.detach()).exp().clamp(max=delta)


def active_labels(budget: int = 100) -> Changes:
    """Active labels, on-policy (arXiv:2407.02119: abstract and notes read). From t = 2 only its own samples:

        best and worst under r_(t−1); the `budget` pairs of the smallest margins are labelled by the true reward
    The others keep the implicit reward's label: theirs is of a proxy reward model, trained on the queries, and it is
    left out. What is worth a query is a small margin, not a core set of embeddings.
    """

    def pairs(run: Run, t: int) -> Review:
        if t == 1:
            return all_pairs(run)
        samples = ranked(run, t, against=0)
        made, margins = best_and_worst(run, samples, samples.rewards)
        for p in margins.argsort()[:budget].tolist():
            x, w, l = made[p]
            made[p] = Pair(x, l, w) if true_reward(x, l) > true_reward(x, w) else made[p]
        return to_train_on(run, t, made)

    return {"pairs": pairs}


def aihf(w: float = 0.1) -> Changes:
    """AIHF, joint demonstrations and preferences (arXiv:2406.06874: abstract and first page read). In one stage:

        −log σ(βm) − w log π_θ(y*|x),    y*: a demonstration
    Assumed: this direct form, w = 0.1. A demonstration is the best of 16 of this world's responses: nearly perfect.
    """

    def backward(policy, pairs: list[Pair], reference, b: int, *others, plain=train.backward) -> list[Tensor]:
        shown = [ids(demonstration(text(pair.prompt))) for pair in pairs]
        logps, _ = logprobs.sequence_logprobs(policy, [pair.prompt for pair in pairs], shown)
        (-w * logps.sum() / b).backward()
        return plain(policy, pairs, reference, b, *others)

    return {"pairs": lambda run, t: all_pairs(run), "backward": backward}


@functools.cache
def demonstration(x: str) -> str:
    rng = random.Random(x)
    return max((playground.write_response(x, rng) for _ in range(16)), key=lambda y: playground.true_reward(x, y))


def sapo(decay: float = 0.5) -> Changes:
    """SAPO, self-augmented preferences (arXiv:2405.20830 and its code). The rejected response is not used:

        y_w = A B C, a chosen response of D;    y_l = A B′ C,  B′ ~ E(·|x, A);    E ← bE + (1−b)θ
    B is a quarter of y_w; where B′ ends the response there is no C. Simplified: E and the segments are made once an
    iteration, not at every step; the replay buffer is the iteration before; the reference does not follow E.
    """

    def rewritten(run: Run, t: int) -> list[Pair]:
        rng = random.Random(f"{run.config.seed} {t}")
        cuts = [(rng.randrange(len(y) - len(y) // 4), len(y) // 4) for _, y, _ in run.offline]
        asked = [x + y[:cut] for (x, y, _), (cut, _) in zip(run.offline, cuts)]

        def draw() -> list[Ids]:
            drawn = sample_responses(moving_average(run, t, decay), asked, 1, max_new_tokens=8, temperature=1.0,
                                     top_p=1.0, eos_token_id=run.eos_ids, pad_token_id=TOKENIZER.pad_token_id,
                                     seed=seed_of(run.config.seed, t, "segments"))  # fmt: skip
            return [y for [(y, _)] in drawn]

        drawn = zip(run.offline, cuts, folder.phase(run.out, f"segments-{t}", draw))
        return [Pair(x, y, spliced(y, cut, n, new, run.eos_ids)) for (x, y, _), (cut, n), new in drawn]

    def pairs(run: Run, t: int) -> Review:
        made = [pair for i in (t - 1, t) if i > 0 for pair in rewritten(run, i)]  # those of t − 1 are on disk
        return to_train_on(run, t, [pair for pair in made if pair.chosen != pair.rejected])

    return {"pairs": pairs}


def spliced(y: Ids, cut: int, n: int, new: Ids, ends: list[int]) -> Ids:
    """y with n tokens of `new` in the place of its n tokens from `cut` on; no more after them, if they end."""
    return y[:cut] + new[:n] + ([] if new[:n][-1:] and new[:n][-1] in ends else y[cut + n :])


def moving_average(run: Run, t: int, decay: float):
    """E after t − 1 iterations, from θ_0 on."""
    mean = copy.deepcopy(run.policies.get(0))
    for policy in (run.policies.get(i) for i in range(1, t)):
        for kept, new in zip(mean.parameters(), policy.parameters()):
            kept.data.lerp_(new.data, 1 - decay)
    return mean


def irepo(votes: int = 8, temperature: float = 0.5) -> Changes:
    """iREPO (arXiv:2405.15230: abstract read). Two samples of π_θ(t−1), the reference; regression to a soft label:

        (βm − log(p / (1−p)))²,    p: the share of votes for the first
    Assumed: 8 votes, for the first with probability σ(ΔR*/0.5), flipped as D's labels are; p keeps half a vote from 0
    and 1. Of D only the prompts are used. Logged margins are less the logit.
    """

    def pairs(run: Run, t: int) -> Review:
        rng, noise = random.Random(f"{run.config.seed} {t}"), run.config.label_noise
        prompts = [x for x, _, _ in run.offline]
        made = [Pair(x, a, b) for x, ((a, a_ended), (b, b_ended)) in zip(prompts, run.sample(t - 1, prompts))
                if a_ended and b_ended and a != b]  # fmt: skip
        reviewed = to_train_on(run, t, made, against=t - 1)
        for (x, a, b), reference in zip(made, reviewed.training_set.reference):
            ahead = true_reward(x, a) - true_reward(x, b)
            likely = noise + (1 - 2 * noise) / (1 + math.exp(-ahead / temperature))
            # With log π_ref of the first raised by logit(p)/β the loss is (βm)²: no other function need know p.
            reference[0] += logit(sum(rng.random() < likely for _ in range(votes)), votes) / run.config.beta
        return reviewed

    return {"pairs": pairs, "pair_losses": lambda r, config: (config.beta * (r[:, 0] - r[:, 1])) ** 2}


def logit(won: int, votes: int) -> float:
    p = min(max(won, 0.5), votes - 0.5) / votes
    return math.log(p / (1 - p))


def dice() -> Changes:
    """DICE (arXiv:2406.09760 and its code). The best and the worst sample by a reward without length, and old pairs:

        −log σ(βm),    q(x,y) = log π_θ(t−1)(y|x) − log π_θ(t−2)(y|x) − α|y|,    reference π_θ(t−1)
    α: best and worst have the same mean length. From t = 2 on; of the first half of D its prompts are sampled for, of
    the second the pairs are kept. Simplified: 4 samples, not 16; lengths in tokens; prompts occur in both halves.
    """

    def pairs(run: Run, t: int) -> Review:
        if t == 1:
            return all_pairs(run)
        half = len(run.offline) // 2
        samples = ranked(run, t, against=t - 2, count=half)
        lengths = torch.tensor([[len(y) for y in row] for row in samples.responses])
        made, _ = best_and_worst(run, samples, samples.rewards - length_price(samples.rewards, lengths) * lengths)
        return to_train_on(run, t, made + run.offline[half:], against=t - 1)

    return {"pairs": pairs}


def length_price(rewards: Tensor, lengths: Tensor) -> float:
    """Of α = 0, 0.001, …, 1 that at which best and worst differ least in length; (P, n), rewards NaN where unusable."""

    def gap(alpha: float) -> float:
        q, some = rewards - alpha * lengths, rewards.isfinite().any(1)
        best, worst = q.nan_to_num(nan=-math.inf).argmax(1), q.nan_to_num(nan=math.inf).argmin(1)
        longer = lengths.gather(1, best[:, None]) - lengths.gather(1, worst[:, None])
        return abs(longer[some].double().mean().item())

    return min((k / 1000 for k in range(1001)), key=gap)


def spin() -> Changes:
    """SPIN (arXiv:2401.01335 and its code). The chosen responses against own samples; the rejected ones are not used:

        −log σ(βm),    y_w: the chosen response of D,    y_l ~ π_θ(t−1)(·|x),    reference π_θ(t−1)
    The round before's pairs stay. Two samples a prompt, not one; and all rounds have one β and one learning rate.
    """

    def pairs(run: Run, t: int) -> Review:
        made, prompts = [], [x for x, _, _ in run.offline]
        for i in range(max(t - 2, 0), t):  # samples of the round before are on disk
            for (x, w, _), row in zip(run.offline, run.sample(i, prompts)):
                made += [Pair(x, w, y) for y, ended in row if ended and y != w]
        return to_train_on(run, t, made, against=t - 1)

    return {"pairs": pairs}


NEIGHBOURS: dict[str, tuple] = {  # the method, what it is given beside D, and flags
    "RAD, true scores": (lambda: rad(True), "the true score of every response", {}),
    "RAD, own scores": (lambda: rad(False), "nothing", {}),
    "SPO": (spo, "nothing", {}),
    "BMC": (bmc, "an editor who knows true scores: no wrong label is left", {}),
    "active labels": (active_labels, "200 true labels", {}),
    "AIHF": (aihf, "a nearly perfect answer to every prompt", {}),
    "SAPO": (sapo, "less: no rejected responses", {}),
    "iREPO": (irepo, "up to 48,000 noisy votes; less: no pairs", {"samples_per_prompt": 2}),
    "DICE": (dice, "nothing", {}),
    "SPIN": (spin, "less: no rejected responses", {"samples_per_prompt": 2}),
}
OF_CLAIMS = "plain training", "robust DPO, ε = 0.3", "the smallest margins", "selection only", "SeRA"
GIVEN = {name: given for name, (_, given, _) in NEIGHBOURS.items()} | {"robust DPO, ε = 0.3": "ε, of 30 % flipped"}


def runs_of_one_base(work: Path, runs: dict[str, dict]) -> dict[str, dict]:
    """claims.py's, of one method, whose functions stand in train.py's place (methods call the true all_pairs)."""
    [method] = {spec.get("neighbour") for spec in runs.values()}
    changes = NEIGHBOURS[method][0]() if method else {"train": train.train}  # itself: nothing is changed
    if pairs := changes.pop("pairs", None):  # claims.py counts tokens in `review`: all_pairs goes through it too
        changes["review"] = lambda t, offline, log_prob, *_: pairs(log_prob.__self__, t)  # log_prob is the run's
        changes["all_pairs"] = lambda run: train.review(1, run.offline, run.log_prob, run.sample, run.config)
    with mock.patch.multiple(train, **changes), mock.patch.object(train.report, "write_report", lambda *_: None):
        specs = {name: {flag: spec[flag] for flag in spec if flag != "neighbour"} for name, spec in runs.items()}
        return claims.runs_of_one_base(work, specs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="writes nothing")
    quick = parser.parse_args().quick
    claims.SEEDS, claims.TUNING_SEEDS["dpo"], claims.GRID["dpo"] = range(5), [10, 11], ([0.03, 0.1, 0.3, 1.0], [1e-3])
    claims.METHODS = {name: (claims.METHODS | claims.BASELINES)[name] for name in OF_CLAIMS}
    claims.BASELINES = {name: {"neighbour": name, **flags} for name, (_, _, flags) in NEIGHBOURS.items()}
    claims.IN_FIGURE = {method: (f"C{i % 5}", "os^"[i // 5]) for i, method in enumerate([*OF_CLAIMS, *NEIGHBOURS])}
    if quick:
        claims.make_quick()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "quick.json") if quick else claims.RESULTS / "neighbours.json"
        (runs, machines), known = claims.read(file), {} if quick else claims.read(claims.RESULTS / "claims.json")[0]
        for desc in ("tuning", "studies"):
            wanted = claims.tuning("main") if desc == "tuning" else [
                spec for noise in (0.3, 0.0) for row in claims.rows_at(runs, noise).values() for spec in row]
            runs |= {name: known[name] for name in {*map(claims.name_of, wanted)} & known.keys()}
            claims.make(wanted, runs, machines, file, Path(place), desc, runs_of_one_base)
        shown = {f"neighbours: {noise:.0%}": claims.wide_table(runs, noise, GIVEN) for noise in (0.3, 0.0)}
        print("\n\n".join(shown.values()))
        if not quick:
            claims.draw_frontier(runs, claims.RESULTS / "neighbours.png")
            README.write_text(filled(README.read_text(), shown))


if __name__ == "__main__":
    main()
