"""The losses: TRL's on the same numbers, float64 by hand, and gradients."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from shared import tiny_model

from sera_min.logprobs import implicit_reward, sequence_logprobs
from sera_min.losses import dpo_loss, ipo_loss, simpo_loss, slic_loss
from sera_min.select import ensemble_margin

LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "slic": slic_loss, "simpo": simpo_loss}
MARGINS = torch.tensor([-30.0, -2.0, -0.1, 0.0, 0.3, 4.0, 50.0])


def test_known_numbers():
    zero = torch.zeros(3)
    for beta, smoothing in [(0.1, 0.0), (1.0, 0.3)]:
        torch.testing.assert_close(dpo_loss(zero, beta, smoothing), torch.full((3,), math.log(2)))
    assert torch.equal(slic_loss(torch.tensor([0.0, 20.0]), 0.1), torch.tensor([1.0, 0.0]))
    assert ipo_loss(torch.tensor([5.0]), 0.1).item() == 0
    torch.testing.assert_close(simpo_loss(torch.tensor([0.5])), torch.tensor([math.log(2)]))  # at the target margin


def test_against_float64_by_hand():
    for m in MARGINS.tolist():
        sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
        want = -0.9 * math.log(sigmoid(0.5 * m)) - 0.1 * math.log(sigmoid(-0.5 * m))
        assert dpo_loss(torch.tensor([m]), 0.5, 0.1).item() == pytest.approx(want, rel=1e-5)
        want = -math.log(sigmoid(2 * m - 0.7))
        assert simpo_loss(torch.tensor([m]), 2.0, 0.7).item() == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_direction(name):
    loss = LOSSES[name]
    m = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (m,))
    loss(m).sum().backward()
    assert (m.grad < 0).all()  # below its target, every loss wants a larger margin
    assert loss(torch.tensor([1e4, -1e4])).isfinite().all()


@pytest.fixture(scope="module")
def trl_case(tmp_path_factory):
    """A trainer of TRL's on four pairs, its policy moved away from the reference, and the same pairs as token ids."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from shared import bpe_tokenizer

    tokenizer = bpe_tokenizer()
    rows = [
        {"prompt": f"Tell me about {w}:", "chosen": f" the {w} is lovely" + " yes" * i, "rejected": f" no {w}"}
        for i, w in enumerate(["fox", "forest", "owl", "lake"])
    ]

    def losses(loss_type, beta, label_smoothing=0.0):
        policy, reference = tiny_model(vocab_size=len(tokenizer)), tiny_model(vocab_size=len(tokenizer))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.02 * torch.randn_like(p))
        config = trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), loss_type=[loss_type], beta=beta, label_smoothing=label_smoothing,
            report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=4, disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        policy.eval()
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            theirs = trainer.compute_loss(policy, batch).item()
        prompts, responses = unpad(batch)
        return policy, reference, prompts, responses, theirs

    return losses


def unpad(batch):
    """TRL's collated batch (chosen rows, then rejected) back to token ids of prompts and responses."""
    prompts, responses = [], []
    for ids, attended, completion in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
        ids, completion = ids[attended.bool()].tolist(), completion[attended.bool()].bool().tolist()
        prompts.append([i for i, c in zip(ids, completion) if not c])
        responses.append([i for i, c in zip(ids, completion) if c])
    return prompts, responses


@pytest.mark.parametrize(
    "ours, theirs, beta",
    [("dpo", "sigmoid", 0.1), ("dpo", "sigmoid", 0.7), ("slic", "hinge", 0.1), ("ipo", "ipo", 0.1)],
)
def test_trl_has_the_same_loss_on_the_same_model(trl_case, ours, theirs, beta):
    """From token ids to the mean loss: log-probs, reward, margin and loss are TRL's."""
    policy, reference, prompts, responses, want = trl_case(theirs, beta)
    per_token = ours == "ipo"
    with torch.no_grad():
        sums, counts = sequence_logprobs(policy, prompts, responses)
        r = implicit_reward(sums, sequence_logprobs(reference, prompts, responses)[0], counts if per_token else None)
    m = r[:4] - r[4:]
    assert m.abs().max() > 0.01  # the policy has moved: the losses below are not those of a zero margin
    # A float32 sum of 100 nats is known to 4e-6, and the slope of DPO's and SLiC's loss is at most β.
    assert LOSSES[ours](m, beta).mean().item() == pytest.approx(want, rel=1e-6, abs=1e-5 * beta)


@pytest.mark.parametrize("theirs", ["simpo", "sigmoid"])
def test_trl_has_the_same_simpo_and_label_smoothing(theirs):
    """TRL's CPOTrainer has both, as functions of the two log-probs."""
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    torch.manual_seed(0)
    chosen, rejected = -torch.rand(16, dtype=torch.float64) * 3, -torch.rand(16, dtype=torch.float64) * 3
    self = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), loss_type=theirs, beta=2.0, simpo_gamma=1.0, alpha=0.0,
        label_smoothing=0.2 if theirs == "sigmoid" else 0.0,
    )  # fmt: skip
    want = trainer.cpo_loss(self, chosen, rejected)[0]
    got = simpo_loss(chosen - rejected, 2.0, 1.0) if theirs == "simpo" else dpo_loss(chosen - rejected, 2.0, 0.2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_defaults_are_those_of_the_papers_and_of_trl():
    functions = (*LOSSES.values(), ensemble_margin)
    defaults = [{name: p.default for name, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
                for f in functions]  # fmt: skip
    assert defaults == [{"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.1}, {"beta": 0.1, "delta": 1.0},
                        {"beta": 2.0, "gamma": 1.0}, {"previous": None, "gamma": 0.5}]  # fmt: skip


def test_slic_s_margin_of_1_may_be_another():
    assert slic_loss(torch.tensor([0.0, 5.0, 20.0]), 0.1, delta=2.0).tolist() == [2.0, 1.5, 0.0]
