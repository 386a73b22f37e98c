"""What the meter counts against PyTorch's own count of matrix products."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from negfast import spans
from negfast.train import speed
from negfast.train.speed import Meter
from tests.train.small import make_small


@pytest.mark.parametrize("call", ["prompts", "completions", "both"])
def test_operations_are_those_of_the_decoders_products(call):
    """PyTorch counts every product; attention, which it may not know on every device, is taken out of both counts."""
    small = make_small(0)
    meter = Meter(small.policy)
    meter.pair = 0
    layout, completions = small.histories().layout, torch.full((6, 2), 9)
    layout.ask(np.arange(3).repeat(2))
    if call == "completions":
        with torch.no_grad():
            small.policy.hidden(layout, small.tokens, None)
    prompts = None if call == "completions" else small.tokens
    counter = FlopCounterMode(display=False)
    with meter, meter.step(), counter:
        small.policy.hidden(layout, prompts, None if call == "prompts" else completions).sum().backward()
    products = sum(
        count for name, count in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    # forward and backward are three equal parts; the last layer projects some prompt rows that it then drops
    assert meter.operations <= products and meter.operations == pytest.approx(products, rel=0.04)


def test_pairs_of_a_causal_prompt_and_of_completions_that_share_it():
    layout = make_small(0).histories().layout
    lengths = layout.lengths.tolist()
    layout.ask(np.arange(3).repeat(2), np.concatenate([[n, n // 2] for n in lengths]))
    layout.new_tokens = 2
    prompts = sum(n * (n + 1) / 2 for n in lengths)
    completions = sum((prefix + 1) + (prefix + 2) for n in lengths for prefix in (n, n // 2))
    found = speed.attention_pairs(layout)
    assert found == (prompts, completions)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_data_sheet_is_found_by_whole_words(name, peak):
    assert speed.data_sheet(name) == peak


def test_figures_of_a_step(monkeypatch):
    now = iter([10.0, 10.5, 10.75, 12.0])  # step begins, data begins and ends, step ends
    meter = Meter(make_small(0).policy)
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with meter.step(), spans.data():
        meter.operations = 1e9
    figures = meter.figures(tokens=300)
    assert figures["seconds"] == 2.0 and figures["tokens_per_s"] == 150 and figures["data_wait"] == 0.125
    assert figures["mfu"] == pytest.approx(1e9 / 2.0 / meter.peak) and figures["peak_mib"] > 10
