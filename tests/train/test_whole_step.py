"""A whole step of SFT and of GRPO against the stock decoder, which reads one branch at a time: in float64."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Model

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.data.log import DAY
from negfast.kernels.trie_grpo_reference import group_advantage
from negfast.model.histories import item_text
from negfast.model.policy import Policy
from negfast.runtime.engine import Engine, build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.sid.prior import MARKERS, NEXT_DISLIKE, DecayedMass, child_log_prior
from negfast.sid.trie import SeenNodes
from negfast.train.grpo.stage import GrpoStage
from negfast.train.histories import Drawn
from negfast.train.sft import ItemBatch, SftStage
from tests.model.naive_histories import Position, naive_prefix
from tests.sid.reference import seen_nodes_reference
from tests.train.small import take_norms_in_their_own_dtype


@pytest.fixture
def make_engine(tiny_run, monkeypatch):
    """A tiny engine in float64, its weights random, its histories cut into windows of 8 events."""

    def make(*overrides: str) -> Engine:
        run = RunFolder(tiny_run)
        config = load_config(tiny_run / "config.toml", None, ["history.window=8", *overrides])
        dataset = Dataset.open(run.data)
        torch.manual_seed(5)
        monkeypatch.setattr(RunFolder, "config", config)
        policy, tokenizer = run.load_policy(dataset)
        engine = build_engine(config, dataset, policy, tokenizer, torch.device("cpu"))
        torch.nn.init.normal_(policy.block.head.weight, std=0.3)
        if policy.text_projection is not None:
            torch.nn.init.normal_(policy.text_projection, std=0.3)
        take_norms_in_their_own_dtype(policy.decoder)
        policy.double()
        prior = engine.histories.prior
        engine.histories.prior = replace(prior, levels=[in_double(level) for level in prior.levels])
        return engine

    return make


def in_double(mass: DecayedMass) -> DecayedMass:
    return replace(mass, mass=mass.mass.double(), decay=mass.decay.double())


class OneAtATime:
    """Branches of a policy, each by a causal forward of transformers' decoder over its prefix and its own tokens."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.engine, self.policy = engine, policy
        config = copy.deepcopy(policy.decoder.config)
        self.decoder = Qwen3Model._from_config(config, attn_implementation="sdpa")
        take_norms_in_their_own_dtype(self.decoder)
        self.decoder.double().load_state_dict(policy.decoder.state_dict())

    def states(self, user: int, moment: int, view: int, own: Any) -> Tensor:
        """Hidden states [n, d] of the positions that ``own`` makes of the branch's gap token."""
        prefix, gap = naive_prefix(self.engine, user, moment, view)
        positions = prefix + own(gap)
        base = self.policy.vocabulary.base
        rows: Tensor = self.policy.block.rows
        if self.policy.text_projection is not None:
            vectors = torch.from_numpy(item_text(self.engine.data)).double()
            rows = torch.cat([rows, vectors @ self.policy.text_projection])
        embedded = torch.stack([rows[torch.tensor(ids) - base].sum(0) for ids in positions])
        return self.decoder(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0, len(prefix) :]

    def item_log_probs(
        self, user: int, day: int, view: int, branch: int, item: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """For every level: log p of all codes [K], -inf where none is; which there are; the item's own."""
        engine, vocabulary = self.engine, self.policy.vocabulary
        codes, nodes = engine.trie.codes[item].tolist(), [0, *engine.trie.item_nodes[item].tolist()]

        def own(gap: int) -> list[Position]:
            fed = [vocabulary.code_base(level) + code for level, code in enumerate(codes[:-1], 1)]
            return [[vocabulary.marker(MARKERS[branch]), gap], *([code] for code in fed)]

        moment = (day + 1) * DAY
        states = self.states(user, moment, view, own)
        log, mine = engine.log, slice(engine.log.user_offsets[user], engine.log.user_offsets[user + 1])
        seen: Any = seen_nodes_reference(engine.trie, [log.item[mine][log.time[mine] < moment].tolist()])
        prior = engine.histories.prior.for_requests(np.array([day]), SeenNodes.from_packed(seen, engine.trie, "cpu"))
        for level, code in enumerate(codes):
            node, row = torch.tensor([nodes[level]]), torch.tensor([0])
            mass, valid, _ = child_log_prior(engine.chooser.trie, prior, branch, level, node, row)
            logits = self.policy.code_logits(states[level : level + 1], level + 1)
            logits = logits + engine.chooser.prior_weight * mass
            yield logits.masked_fill(~valid, -torch.inf).log_softmax(-1)[0], valid[0], code

    def target_loss(self, requests: Any, items: ItemBatch, drawn: Drawn, views: np.ndarray) -> Tensor:
        """Weighted targets over the number of requests."""
        total = torch.zeros((), dtype=torch.float64)
        columns = (items.targets.requests, items.branches, items.targets.items, items.weights)
        for row, branch, item, weight in zip(*(column.tolist() for column in columns), strict=True):
            request, view = drawn.requests[row], int(views[drawn.owner[row]])
            asked = int(requests.user[request]), int(requests.day[request]), view, branch, item
            total = total - weight * torch.stack([p[code] for p, _, code in self.item_log_probs(*asked)]).sum()
        return total / len(drawn.requests)

    def gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """By the policy's names."""
        parameters: dict[str, torch.nn.Parameter] = {
            **{f"decoder.{name}": p for name, p in self.decoder.named_parameters()},
            **{f"block.{name}": p for name, p in self.policy.block.named_parameters()},
        }
        if self.policy.text_projection is not None:
            parameters["text_projection"] = self.policy.text_projection
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))


def note_draws(task: Any) -> dict[str, Any]:
    """What the task's next histories are read for: the draw, and the view of each."""
    noted, read = dict[str, Any](), task.read

    def noting(drawn: Drawn, micro_batch: Any, views: np.ndarray) -> Any:
        noted.update(drawn=drawn, views=views)
        return read(drawn, micro_batch, views)

    task.read = noting
    return noted


def read_varied(stage: Any) -> tuple[Any, Drawn, np.ndarray]:
    """The batch of a step that has several windows of a user, a branch before the user's first event, and ragged
    prefixes."""
    noted = note_draws(stage.task)
    for step in range(200):
        batch = stage.read(step)
        drawn, prefix = noted["drawn"], batch.histories.prefix
        user = stage.task.requests.user[drawn.requests]
        windows = np.unique(np.stack([user, drawn.owner]), axis=1).shape[1]
        if windows > len(np.unique(user)) and prefix.min() == 1 and len(np.unique(prefix)) > 4:
            return batch, drawn, noted["views"]
    raise AssertionError("no such step")


def assert_same(policy: Policy, loss: Tensor, reference: OneAtATime, expected: Tensor) -> None:
    loss.backward()
    assert abs(loss.item() - expected.item()) <= 1e-10 * abs(expected.item())
    wanted = reference.gradients(expected)
    compared = 0
    for name, parameter in policy.named_parameters():
        want = wanted.get(name)
        assert (parameter.grad is None) == (want is None), name
        if want is not None and parameter.grad is not None:
            assert (parameter.grad - want).abs().max() <= 1e-10 * want.abs().max() != 0, name
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("positions", ["events", "codes"])
@pytest.mark.parametrize(("context", "text"), [("day", "true"), ("event", "false"), ("event", "true")])
def test_an_sft_step_is_its_branches_one_at_a_time(make_engine, positions, context, text):
    engine = make_engine(
        f"history.text={text}",
        f"history.positions={positions}",
        f"history.context={context}",
        "sft.histories=12",
        "sft.targets=2",
        "sft.negative_view=0.3",
        "sft.positive_view=0.3",
    )
    stage = SftStage(engine)
    torch.nn.init.normal_(engine.policy.block.head.weight, std=0.3)  # the stage starts it at zero
    batch, drawn, views = read_varied(stage)
    assert len(set(views.tolist())) == 3
    loss = stage.step(batch).loss
    reference = OneAtATime(engine, engine.policy)
    expected = reference.target_loss(stage.task.requests, batch.items, drawn, views)
    assert_same(engine.policy, loss, reference, expected)


@pytest.mark.parametrize("positions", ["events", "codes"])
def test_a_grpo_step_is_its_completions_one_at_a_time(make_engine, positions):
    engine = make_engine(
        f"history.positions={positions}",
        "history.text=true",
        "grpo.histories=8",
        "grpo.set_size=2",
        "grpo.beta=0.2",
        "grpo.schedule=static",
        "grpo.mixed_share=0.5",
        "grpo.sft_weight=0.4",
        "sft.targets=2",
    )
    stage = GrpoStage(engine)
    with torch.no_grad():  # away from the reference policy
        for parameter in [*engine.policy.decoder.layers.parameters(), *engine.policy.block.parameters()]:
            parameter += 0.05 * torch.randn_like(parameter)
    batch, drawn, views = read_varied(stage)
    assert len(set(views.tolist())) == 2
    table = batch.groups.rewards
    batch = replace(batch, groups=replace(batch.groups, rewards=replace(table, terms=table.terms.double())))
    taken: list[Any] = []
    sample = stage.sample

    def noted(*arguments: Any) -> Any:
        taken.append(sample(*arguments))
        return taken[-1]

    stage.sample = noted  # type: ignore[method-assign,assignment]
    loss = stage.step(batch).loss

    reference = OneAtATime(engine, engine.policy)
    expected = 0.4 * reference.target_loss(stage.task.requests, batch.items, drawn, views)
    [step] = taken
    assert stage.loss.reference is not None
    frozen = OneAtATime(engine, stage.loss.reference)
    advantage = group_advantage(step.reward.sum(-1), stage.loss.objective)
    assert advantage.abs().max() > 0
    terms = []
    for row, items in enumerate(step.rollout.items.tolist()):
        request, view = drawn.requests[row], int(views[drawn.owner[row]])
        for number, item in enumerate(items):
            branch = int(stage.requests.user[request]), int(stage.requests.day[request]), view, NEXT_DISLIKE, item
            with torch.no_grad():
                before = [p for p, _, _ in frozen.item_log_probs(*branch)]
            for (log_p, valid, code), old in zip(reference.item_log_probs(*branch), before, strict=True):
                if valid.sum() > 1:
                    kl = (log_p.exp()[valid] * (log_p - old)[valid]).sum()
                    gain = (log_p[code] - log_p[code].detach()).exp() * advantage[row, number]
                    terms.append(0.2 * kl - gain)
    expected = expected + torch.stack(terms).sum() / (step.rollout.items.numel() * engine.trie.levels)
    assert_same(engine.policy, loss, reference, expected)
