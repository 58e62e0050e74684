"""The related methods of experiments/neighbours.py: their equations on numbers worked by hand, and a small run of each."""

import inspect
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shared import tiny_model

import train
from sera_min import playground
from sera_min.logprobs import body_of, sequence_logprobs, token_logprobs
from sera_min.machinery.config import Config, resolve
from sera_min.machinery.run import Run
from sera_min.pairs import Pair, Preferences

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent / "experiments")]
import claims  # noqa: E402
import neighbours  # noqa: E402
from neighbours import ids, text  # noqa: E402
from test_claims import InThisProcess, put_back_what_a_quick_run_changes  # noqa: E402

X = ids("tell me about the fox and the cave")[:-1]
GOOD, FAIR, BAD = "the fox is lovely .", "the owl is lovely .", "the owl is ugly ."  # true reward 1, 0, −1


def pairs_of(changes, t, offline, *, sampled=(), logps=0.0, policies=None, **flags):
    """A method's review of iteration t. sampled: of each prompt the samples, all ended; logps: log π_θi(y|x) by i, y."""
    score = logps if callable(logps) else lambda i, y: logps
    samples = [[(ids(y), True) for y in row] for row in sampled]
    asked = SimpleNamespace(
        log_prob=lambda i, rows: torch.tensor([float(score(i, text(y))) for y in rows.responses]),
        sample=lambda i, prompts, n, seed: samples[: len(prompts)],
        eos_ids=[neighbours.TOKENIZER.eos_token_id],
    )
    config = resolve(Config(device="cpu", beta=1.0, **flags))
    given = Preferences(offline, list(range(len(offline))), [text(x) for x, _, _ in offline])
    return changes["review"](t, given, policies or asked, config, None)


def pair(chosen, rejected):
    return Pair(X, ids(chosen), ids(rejected))


def texts(review):
    return [(text(x), text(w), text(l)) for x, w, l in review.training_set.pairs]


def test_rad_trains_on_both_responses_each_under_its_own_score():
    of_d = [pair(GOOD, BAD), pair(BAD, GOOD), pair(FAIR, GOOD), pair(GOOD, GOOD)]  # the label does not matter
    made = pairs_of(neighbours.rad(True), 1, of_d).training_set.pairs
    assert [(text(x), text(w), text(l)) for x, w, l in made[:4]] == [
        (text(X), GOOD, BAD), ("and and and and fox and the cave", BAD, GOOD),
        ("and and and and fox and the cave", BAD, GOOD), (text(X), GOOD, BAD),
    ]  # fmt: skip
    assert len(made) == 6  # the last pair has one score
    of_two = pairs_of(neighbours.rad(True), 2, [pair(GOOD, BAD)], logps=lambda i, y: -float(i) - 5 * (y == BAD))
    [reference, _] = of_two.training_set.reference.tolist()
    assert reference == [0.0, -5.0]  # log π_θ0 of the chosen and of the rejected
    prefers_bad = lambda i, y: float(i) if y == BAD else 0.0  # noqa: E731  # as π_θ1 has come to do
    first, second, *_ = pairs_of(neighbours.rad(False), 2, [pair(GOOD, BAD)] * 2, logps=prefers_bad).training_set.pairs
    assert (text(first.prompt)[:8], text(first.chosen)) == ("the the ", GOOD)
    assert (text(second.prompt), text(second.chosen)) == (text(X), BAD)


def gradients(pair_losses, policy, pairs, config):
    """Of the sum of the losses; the log-probs are the policy's."""
    policy.zero_grad()
    losses, logps = pair_losses(policy, pairs, torch.zeros(len(pairs), 2), config)
    torch.testing.assert_close(logps, train.pair_losses(policy, pairs, torch.zeros(len(pairs), 2), config)[1])
    losses.sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def test_spo_and_aihf_add_their_terms_to_the_loss():
    policy = playground.make_sft_policy(0, "cpu", steps=2)[0]
    pairs, config = [pair(f"{GOOD} {GOOD}", BAD), pair(FAIR, GOOD)], resolve(Config(device="cpu"))
    plain = gradients(train.pair_losses, policy, pairs, config)

    aihf = gradients(neighbours.aihf(0.5)["pair_losses"], policy, pairs, config)
    best = ids(neighbours.demonstration(text(X)))
    rng = random.Random(text(X))
    tried = [playground.true_reward(text(X), playground.write_response(text(X), rng)) for _ in range(16)]
    assert neighbours.true_reward(X, best) == max(tried) > min(tried)
    policy.zero_grad()
    (-0.5 * sequence_logprobs(policy, [X, X], [best, best])[0].sum()).backward()
    term = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(aihf, plain + term, rtol=1e-4, atol=1e-6)

    for degree in (0, 3):  # nothing is taken away, and all key words
        changes = neighbours.spo(gamma=0.7)
        spo = inspect.getclosurevars(changes["pair_losses"]).nonlocals
        spo["frequent"].update(ids("the is .")[:-1])
        spo["W"].data = torch.randn(spo["W"].shape, generator=torch.Generator().manual_seed(0))
        spo["rng"].randrange, w = (lambda _, degree=degree: degree), spo["W"].detach().clone()
        with_degree = gradients(changes["pair_losses"], policy, pairs, config)
        policy.zero_grad()
        for one in pairs:
            y = one.chosen if degree == 0 else [token for token in one.chosen if token in spo["frequent"]]
            hidden = body_of(policy)(input_ids=torch.tensor([X + y])).last_hidden_state[0, len(X) :].mean(0)
            (0.7 * -(w @ hidden).log_softmax(-1)[degree]).backward()
        term = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in policy.parameters()]
        )
        torch.testing.assert_close(with_degree, plain + term, rtol=1e-4, atol=1e-5)
        assert torch.equal(spo["W"], w) and spo["W"].grad.any()
        changes["pair_losses"](policy, pairs, torch.zeros(2, 2), config)  # the next batch: first its Adam takes a step
        assert not torch.equal(spo["W"], w) and spo["W"].grad is None


def test_spo_takes_away_a_share_of_what_is_rare():
    y, rare = ids("the fox is lovely . the cave seems dark ."), ids("fox lovely cave")[:-1]
    frequent = {*y} - {*rare}
    for share, left in ((0.0, 3), (1 / 3, 2), (2 / 3, 1), (1.0, 0)):
        less = neighbours.without_key_words(y, frequent, share, random.Random(0))
        assert sum(token in rare for token in less) == left and [t for t in less if t in frequent] == [
            t for t in y if t in frequent
        ]


def test_bmc_mends_the_worst_sentence_and_weighs_where_the_two_differ():
    mended = neighbours.mend(text(X), f"{BAD} {GOOD}", f"{FAIR} {BAD} {FAIR}")
    assert mended == f"{FAIR} {GOOD} {FAIR}"
    # π_θ = 0.8, π_ref = 0.4, δ = 2: w = 1 + 1/0.8, m = 2.25 ln 2
    logps = torch.tensor([0.8, 0.8, 0.1]).log()
    w = neighbours.confidence(logps, [5, 6, 7], [5, 9], 2.0)
    assert w.tolist() == pytest.approx([1.0, 2.25, 3.0])  # the same token; another; none, and 1/0.1 is cut at δ
    assert (w[1] * (logps[1] - math.log(0.4))).item() == pytest.approx(1.5596, abs=1e-4)
    changes = neighbours.bmc()
    policy, reference = (playground.make_sft_policy(seed, "cpu", steps=2)[0] for seed in (0, 1))
    inspect.getclosurevars(changes["pair_losses"]).nonlocals["reference"].append(reference)
    pairs = [pair(GOOD, BAD)]
    losses, logps = changes["pair_losses"](policy, pairs, None, resolve(Config(device="cpu", beta=1.0)))
    [w, l], [w_ref, l_ref] = (
        [one.detach() for one in token_logprobs(m, [X, X], [ids(GOOD), ids(BAD)])] for m in (policy, reference)
    )
    by_hand = []
    for ours, theirs in ((w, w_ref), (l, l_ref)):  # words 2 and 4 differ
        weight = torch.ones(6)
        weight[[1, 3]] += (1 / ours[[1, 3]].exp()).clamp(max=2)
        by_hand.append((weight * (ours - theirs)).sum().item())
    m = by_hand[0] - by_hand[1]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-m))], rel=1e-4)
    assert logps[0].tolist() == pytest.approx([w.sum().item(), l.sum().item()], rel=1e-4)


def test_active_labels_are_those_of_the_smallest_margins():
    scores = {GOOD: 0.0, BAD: 1.0, FAIR: 5.0}  # r_1 has BAD above GOOD, by little
    sampled = [[GOOD, BAD], [FAIR, GOOD], [FAIR, BAD]]

    def asked(budget):
        return pairs_of(neighbours.active_labels(budget=budget), 2, [pair(GOOD, BAD)] * 3, sampled=sampled,
                        logps=lambda i, y: i * scores[y])  # fmt: skip

    assert asked(100).training_set.reference.unique().item() == 0.0  # π_θ0's
    # mended, as it was, as it was
    assert [pair[1:] for pair in texts(asked(1))] == [(GOOD, BAD), (FAIR, GOOD), (FAIR, BAD)]
    assert [pair[1:] for pair in texts(asked(2))][1:] == [(FAIR, GOOD), (FAIR, BAD)]
    assert [pair[1:] for pair in texts(asked(3))][1:] == [(GOOD, FAIR), (FAIR, BAD)]


def test_sapo_splices_and_averages():
    y, ends = [10, 11, 12, 13, 1], [1]
    assert neighbours.spliced(y, 1, 2, [20, 21, 22], ends) == [10, 20, 21, 13, 1]
    assert neighbours.spliced(y, 1, 2, [20, 1], ends) == [10, 20, 1]  # it ended there
    assert neighbours.spliced(y, 1, 2, [1], ends) == [10, 1]
    policies = [tiny_model() for _ in range(3)]
    for i, policy in enumerate(policies):  # E_0 = θ_0 = 0, then θ = 1 twice: 0.75
        for p in policy.parameters():
            p.data.fill_(float(i > 0))
    mean = neighbours.moving_average(SimpleNamespace(get=policies.__getitem__), 3, 0.5)
    assert {p.unique().item() for p in mean.parameters()} == {0.75}
    assert {p.unique().item() for p in policies[0].parameters()} == {0.0}  # the reference is as it was


def test_irepo_regresses_to_the_logit_of_the_votes():
    assert neighbours.logit(8, 10) == pytest.approx(math.log(4)) and neighbours.logit(8, 8) == pytest.approx(
        math.log(15)
    )
    assert neighbours.logit(0, 8) == pytest.approx(-math.log(15)) and neighbours.logit(4, 8) == 0
    changes = neighbours.irepo()
    policy, one = tiny_model(vocab_size=len(neighbours.TOKENIZER)), [pair(GOOD, BAD)]
    with torch.no_grad():
        _, logps = train.pair_losses(policy, one, torch.zeros(1, 2), resolve(Config(device="cpu")))
    reference = logps.clone()
    reference[0, 0] -= 0.4 / 2 - neighbours.logit(8, 10) / 2  # βm = 0.4, p = 0.8
    loss, _ = changes["pair_losses"](
        policy, one, reference, SimpleNamespace(beta=2.0, device="cpu", loss_type="dpo", label_smoothing=0)
    )
    assert loss.item() == pytest.approx(0.9728, abs=1e-3) and loss.requires_grad
    sampled = [[GOOD, BAD]] * 400
    reviewed = pairs_of(changes, 1, [pair(GOOD, BAD)] * 400, sampled=sampled, label_noise=0.0, samples_per_prompt=2)
    shifted = reviewed.training_set.reference
    likely = 1 / (1 + math.exp(-2 / 0.5))  # ΔR* = 2
    assert {round(v, 4) for v in shifted[:, 0].tolist()} <= {round(neighbours.logit(k, 8), 4) for k in range(9)}
    votes = {round(neighbours.logit(k, 8), 4): k for k in range(9)}
    mean = sum(votes[round(v, 4)] for v in shifted[:, 0].tolist()) / 3200
    assert mean == pytest.approx(likely, abs=0.01) and shifted[:, 1].abs().max() == 0
    reviewed = pairs_of(
        changes, 2, [pair(GOOD, BAD)] * 400, sampled=sampled, logps=lambda i, y: -float(i), samples_per_prompt=2
    )
    shifted = reviewed.training_set.reference
    assert shifted[:, 1].unique().item() == -1.0  # π_θ1's, and 30 % of the votes are flipped
    mean = sum(votes[round(v + 1, 4)] for v in shifted[:, 0].tolist()) / 3200
    assert mean == pytest.approx(0.7 * likely + 0.3 * (1 - likely), abs=0.03)


def test_dice_s_price_of_length():
    rewards, lengths = torch.tensor([2.0, 3, 1]), torch.tensor([10, 40, 12])
    # best 10, worst 12; below it best is 40
    assert neighbours.length_price(rewards, lengths, [5, 5, 5]) == pytest.approx(0.034)
    uneven = neighbours.length_price(rewards[[0, 1, 2, 0]], lengths[[0, 1, 2, 0]], [5, 5, 5, 6])
    assert uneven == pytest.approx(0.034)  # a prompt with one sample has no difference
    made = pairs_of(neighbours.dice(), 2, [pair(GOOD, BAD)] * 4, sampled=[[GOOD, f"{BAD} {BAD}"]] * 4,
                    logps=lambda i, y: i * len(y) / 100)  # fmt: skip
    assert len(made.training_set.pairs) == 4 and texts(made)[2:] == [(text(X), GOOD, BAD)] * 2  # half are D's
    r, long = {GOOD: 2.0, f"{BAD} {BAD}": 3.0, FAIR: 1.0}, f"{BAD} {BAD}"  # the long one is best by r, not by q
    for t in (2, 3):
        made = pairs_of(neighbours.dice(), t, [pair(GOOD, BAD)] * 4, sampled=[[GOOD, long, FAIR]] * 4,
                        logps=lambda i, y: i * r.get(y, 7.0))  # fmt: skip
        assert texts(made)[:2] == [(text(X), GOOD, FAIR)] * 2  # 6 tokens each
        assert made.training_set.reference[0].tolist() == [2.0 * (t - 1), 1.0 * (t - 1)]  # π_θ(t−1)'s
    asked = []
    pairs_of(neighbours.dice(), 3, [pair(GOOD, BAD)] * 4, sampled=[[GOOD, long, FAIR]] * 4,
             logps=lambda i, y: asked.append(i) or 0.0)  # fmt: skip
    assert list(dict.fromkeys(asked)) == [2, 1]  # the reward is of two policies; π_θ2 is the reference too


def test_spin_sets_the_chosen_against_samples_of_two_rounds():
    of_d = [pair(GOOD, BAD), pair(FAIR, BAD)]
    first, second = (
        pairs_of(neighbours.spin(), t, of_d, sampled=[[FAIR], [FAIR]], logps=lambda i, y: -float(i)) for t in (1, 2)
    )
    assert [pair[1:] for pair in texts(first)] == [(GOOD, FAIR)]  # of the second the sample is the chosen one
    assert len(second.training_set.pairs) == 2 and second.training_set.reference.unique().item() == -1.0  # π_θ1's
    drawn_from = []
    policies = SimpleNamespace(
        log_prob=lambda i, rows: torch.zeros(len(rows.responses)),
        sample=lambda i, prompts, n, seed: drawn_from.append(i) or [[(ids(GOOD), True)]] * 2,
    )
    for t in (1, 2, 3):
        pairs_of(neighbours.spin(), t, of_d, policies=policies)
    assert drawn_from == [0, 0, 1, 1, 2]


@pytest.fixture(scope="module")
def small_world(tmp_path_factory, sft):
    every, rows = playground.prompts, playground.preferences
    work = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playground, "prompts", lambda part: every(part)[:6])
        patch.setattr(
            playground, "preferences", lambda n, part, **of: rows(min(n, 16 if part == "train" else 8), part, **of)
        )
        patch.setattr(playground, "make_sft_policy", lambda *_: sft)
        patch.setitem(playground.DEFAULTS, "max_new_tokens", 12)  # up to two sentences
        claims.sft(work / "sft-0", 0)
        yield work


@pytest.mark.parametrize("method", neighbours.NEIGHBOURS)
def test_a_small_run(method, small_world, monkeypatch):
    flags = neighbours.NEIGHBOURS[method][2]
    last = 3 if method in {"SAPO", "DICE", "SPIN"} else 2  # these look back further than to the newest policy
    spec = {"iterations": last, "neighbour": method, "seed": 0, "beta": 0.3, "steps_per_iteration": 2, "device": "cpu", **flags}
    sources, write = {}, Run.write_review

    def seen(self, t, review):
        sources[t] = {*review.training_set.sources}
        write(self, t, review)

    monkeypatch.setattr(Run, "write_review", seen)
    [run] = neighbours.runs_of_one_base(small_world, {"one": spec}).values()
    assert [row["iteration"] for row in run["iterations"]] == list(range(last + 1))
    assert all(math.isfinite(row["kl"]) for row in run["iterations"]) and run["iterations"][last]["kl"] != 0
    assert all(row["tokens/trained"] > 0 for row in run["iterations"][1:])
    first = {"SPO", "AIHF", "active labels", "DICE", "RAD, own scores"}  # these begin with all of D
    for t in range(1, last + 1):
        assert (sources[t] == {"own"}) == (method not in {"SPO", "AIHF"} and (t > 1 or method not in first)), (
            t,
            sources[t],
        )


def test_quick_makes_the_tables_and_writes_nothing(small_world, monkeypatch, capsys):
    """Two methods from end to end: one of claims.py, and one of these, beside each other. Each is run once."""
    put_back_what_a_quick_run_changes(monkeypatch)
    monkeypatch.setattr(
        claims, "sft", lambda path, seed: shutil.copytree(small_world / "sft-0", path, dirs_exist_ok=True)
    )
    make_quick = claims.make_quick

    def smaller():
        make_quick()
        claims.EVERY.update(max_train_pairs=16, steps_per_iteration=1)
        claims.GRID["dpo"] = ([1.0], [1e-3])

    made, runs_of_one_base = {}, neighbours.runs_of_one_base

    def once(work, runs):
        """A method's first run stands for its others, which have other labels and prompts."""
        [method] = {spec.get("neighbour") for spec in runs.values()}
        if method not in made:
            [made[method]] = runs_of_one_base(work, runs).values()
        return dict.fromkeys(runs, made[method])

    monkeypatch.setattr(claims, "make_quick", smaller)
    monkeypatch.setattr(claims, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(neighbours, "runs_of_one_base", once)
    monkeypatch.setattr(neighbours, "OF_CLAIMS", ("plain training",))
    monkeypatch.setattr(neighbours, "NEIGHBOURS", {"SPIN": neighbours.NEIGHBOURS["SPIN"]})
    monkeypatch.setattr(sys, "argv", ["neighbours.py", "--quick"])
    monkeypatch.setattr(claims, "RESULTS", None)  # would fail if something were written there
    neighbours.main()
    shown = capsys.readouterr().out
    for noise in ("30%", "0%"):
        at = shown.index(f"|{noise} flipped|given beside the pairs|")
        assert shown[at:].splitlines()[2].startswith("|plain DPO|nothing|1|")
        assert shown[at:].splitlines()[3].startswith("|SPIN|less: no rejected responses|1|")


def test_the_tables_are_those_of_the_results(monkeypatch, tmp_path):
    """With every run there nothing is run, and what is wrong on the page is mended."""
    put_back_what_a_quick_run_changes(monkeypatch)
    results, drawn = claims.RESULTS, []
    text = (results / "neighbours.md").read_text()
    assert text.count("<!-- neighbours: ") == 2 and "|AIHF|" in text
    for name in ("claims.json", "neighbours.json"):
        (tmp_path / name).symlink_to(results / name)
    (tmp_path / "neighbours.md").write_text(text.replace("|AIHF|", "|another|"))

    def make(wanted, runs, *_):
        assert wanted and {*map(claims.name_of, wanted)} <= runs.keys()

    monkeypatch.setattr(claims, "make", make)
    monkeypatch.setattr(claims, "draw_frontier", lambda _, file: drawn.append(file.name))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["neighbours.py"])
    neighbours.main()
    assert (tmp_path / "neighbours.md").read_text() == text and drawn == ["neighbours.png"]


def test_a_method_is_a_function_of_at_most_30_lines():
    for name in ("rad", "spo", "bmc", "active_labels", "aihf", "sapo", "irepo", "dice", "spin"):
        method = getattr(neighbours, name)
        assert len(inspect.getsource(method).splitlines()) <= 30, name
        assert "arXiv:" in method.__doc__
    assert len(Path(neighbours.__file__).read_text().splitlines()) <= 420
