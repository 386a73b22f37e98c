"""LoRA adapters: what trains, what the reference policy shares, and what becomes of them in a run and its export."""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from negfast.config import Model
from negfast.data.dataset import Dataset
from negfast.kernels.trie_grpo import GRPOObjective
from negfast.model.lora import add_adapters, merge_adapters
from negfast.runtime.run_folder import RunFolder
from negfast.train.grpo.loss import GroupLoss
from negfast.train.grpo.stage import freeze
from tests.tiny import run_cli, train_arguments
from tests.train.small import make_small


def adapted(seed: int, trained: bool = True):
    """A small policy with adapters, as training leaves them or as they start."""
    small = make_small(seed)
    add_adapters(small.policy, Model(lora_rank=3))
    small.policy.double()
    if trained:
        for name, parameter in small.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return small


def hidden(small, policy):
    return policy.hidden(small.histories().layout, small.tokens, None)


def update(small, reference, step: int) -> None:
    """A GRPO step by hand, with plain gradient descent."""
    rewards = torch.randn(3, 4, 1, dtype=torch.float64)
    ids = torch.arange(3)
    loss = GroupLoss(small.policy, reference, small.chooser, GRPOObjective(beta=0.1), 4, 0)
    loss.sample(small.histories(), ids, lambda _: rewards, step).terms.loss.backward()
    with torch.no_grad():
        for parameter in small.policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
                parameter.grad = None


def test_untrained_adapters_change_nothing():
    plain, small = make_small(1), adapted(1, trained=False)
    assert torch.equal(hidden(plain, plain.policy), hidden(small, small.policy))


def test_gradients_reach_adapters_and_code_block_alone():
    small = adapted(2)
    loss = GroupLoss(small.policy, None, small.chooser, GRPOObjective(beta=0.0), 4, 0)
    loss.sample(small.histories(), torch.arange(3), lambda _: torch.randn(3, 4, 1), 0).terms.loss.backward()
    touched = {name for name, parameter in small.policy.named_parameters() if parameter.grad is not None}
    linears = [name for name, module in small.policy.decoder.named_modules() if hasattr(module, "lora_A")]
    assert len(linears) == 2 * 7  # q, k, v, o, gate, up and down of each layer
    wanted = {f"decoder.{name}.lora_{ab}.default.weight" for name in linears for ab in "AB"}
    assert touched == wanted | {"block.rows", "block.head.weight"}


def test_the_reference_stays_the_sft_policy_to_the_bit_and_shares_its_base():
    small = adapted(3)
    before = hidden(small, small.policy).clone()
    logits = [small.policy.code_logits(before, level) for level in (1, 2, 3)]
    reference = freeze(small.policy)
    for step in range(2):
        update(small, reference, step)
    assert torch.equal(hidden(small, reference), before)
    assert all(torch.equal(reference.code_logits(before, level), logits[level - 1]) for level in (1, 2, 3))
    assert not torch.equal(hidden(small, small.policy), before)
    assert not torch.equal(small.policy.code_logits(before, 1), logits[0])
    of_reference = dict(reference.named_parameters())
    for name, parameter in small.policy.named_parameters():
        shared = of_reference[name].data_ptr() == parameter.data_ptr()
        assert shared == (not parameter.requires_grad), name
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_merged_it_is_a_stock_model_of_the_same_logits():
    small, plain = adapted(4), make_small(4)
    before = hidden(small, small.policy)
    merge_adapters(small.policy)
    assert (hidden(small, small.policy) - before).abs().max() < 1e-12
    assert {n: p.shape for n, p in small.policy.named_parameters()} == {
        n: p.shape for n, p in plain.policy.named_parameters()
    }
    assert all(parameter.requires_grad for parameter in small.policy.decoder.parameters())


@pytest.fixture(scope="module")
def lora_run(tiny_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    run_cli(*train_arguments(tiny_data, run, model__lora_rank=4, align__steps=2, sft__steps=2, sft__warmup=0))
    return run


def test_a_run_trains_adapters_over_a_base_that_stays(lora_run):
    first, last = (load_file(lora_run / folder / "policy.safetensors") for folder in ("checkpoints/initial", "final"))
    assert first.keys() == last.keys() and any("lora_A" in name for name in first)
    for name in first:
        if "lora_" in name or name.startswith("block.rows"):
            assert not torch.equal(first[name], last[name]), name
        elif name.startswith("decoder."):
            assert torch.equal(first[name], last[name]), name


def test_a_run_resumes_within_grpo_to_the_same_bits(lora_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "grpo")
    (run / "report.md").unlink()
    data = Dataset.open(RunFolder(lora_run).data).path.resolve()
    description = (lora_run / "run.json").read_text().replace(RunFolder(lora_run).read()["data"], str(data))
    (run / "run.json").write_text(description)
    run_cli("train", "--out", str(run))
    assert '"resumed_from": {"stage": "grpo", "step": 2}' in (run / "events.jsonl").read_text()
    for name in ("metrics.jsonl", "final/policy.safetensors"):
        assert (run / name).read_bytes() == (lora_run / name).read_bytes()


def test_an_export_has_the_adapters_in_its_weights(lora_run, tmp_path):
    out = tmp_path / "exported"
    run_cli("export", str(lora_run), "--out", str(out))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not any("lora" in name for name, _ in model.named_parameters())
    engine = RunFolder(lora_run).finished_engine(None)
    requests = engine.split.test
    histories = engine.histories.build(requests.user[:5], requests.moment[:5])
    with torch.no_grad():
        wanted = engine.policy.full_logits(engine.policy.hidden(histories.layout, histories.tokens, None))
        lengths = histories.layout.lengths.tolist()
        for tokens, logits in zip(histories.tokens.split(lengths), wanted.split(lengths), strict=True):
            embedded = model.get_input_embeddings()(tokens).sum(1)  # that of <|none|> is zero
            assert (model(inputs_embeds=embedded[None]).logits[0] - logits).abs().max() < 1e-4


def test_a_run_that_starts_from_another_merges_its_adapters(lora_run, tiny_data, tmp_path):
    run = tmp_path / "run"
    none: dict[str, Any] = dict(align__steps=0, sft__steps=0, sft__warmup=0, sft__reset_head="false", grpo__steps=0)
    run_cli(*train_arguments(tiny_data, run, lora_run, **none))
    engine = RunFolder(lora_run).finished_engine(None)
    merge_adapters(engine.policy)
    initial = load_file(run / "checkpoints" / "initial" / "policy.safetensors")
    merged = {name: value for name, value in initial.items() if not name.startswith("verdict.")}  # fitted anew
    assert all(torch.equal(value, engine.policy.state_dict()[name]) for name, value in merged.items())
