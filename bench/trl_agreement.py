"""That both sides of `bench grpo` compute the same thing: the full objective against TRL's own function."""

import torch

from bench.grpo_step import Case, Ours
from bench.trl_peer import StepTimer, make_trainer
from negfast.serve.export import merged_model
from negfast.sid.prior import MARKERS, NEXT_DISLIKE


def check_against_trl() -> dict[str, float]:
    """Loss and gradient of the full objective against TRL's on the same completions and weights, as relative errors.

    The loss's is relative to the mean absolute advantage, since advantages sum to 0; a gradient's is the largest
    difference over the largest value. Raises AssertionError where one is above 1e-5.
    """
    case = Case((24, 9, 40), group=4, objective="full")
    ours = Ours(case)
    with torch.no_grad():  # a reference that is not the policy
        for parameter in ours.reference.decoder.parameters():
            parameter.mul_(1.05)
    sampled, terms, result, _ = ours.loss()
    result.loss.backward()

    trainer = make_trainer(merged_model(ours.policy), [[2]] * 3, case, case.completions, 1, StepTimer())
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    first = torch.tensor([ours.policy.vocabulary.code_base(level) for level in range(1, case.levels + 1)])
    inputs = padded_inputs(ours, sampled.codes + first)
    rewards = terms.sum(-1)
    inputs["advantages"] = (rewards - rewards.mean(1, keepdim=True)).flatten()
    inputs["num_items_in_batch"] = torch.tensor(case.completions * case.levels)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logits = merged_model(ours.reference)(input_ids=ids, attention_mask=mask).logits[:, -case.levels - 1 : -1]
    log_p = logits.log_softmax(-1).gather(2, inputs["completion_ids"].unsqueeze(-1))
    inputs["ref_per_token_logps"] = log_p.squeeze(-1)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    gradients = {name: parameter.grad for name, parameter in trainer.model.model.layers.named_parameters()}
    errors = {"loss": (abs(loss - result.loss) / inputs["advantages"].abs().mean()).item(), "gradient": 0.0}
    for name, parameter in ours.policy.decoder.layers.named_parameters():
        wanted = gradients[name]
        assert wanted is not None and parameter.grad is not None
        error = (parameter.grad - wanted).abs().max() / wanted.abs().max()
        errors["gradient"] = max(errors["gradient"], error.item())
    assert max(errors.values()) < 1e-5, f"full objective against TRL: {errors}"
    return errors


def padded_inputs(ours: Ours, completions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, once for every completion, as the peer has them."""
    lengths, group = ours.case.lengths, ours.case.group
    prompts = torch.full((len(lengths), max(lengths)), ours.policy.vocabulary.marker(MARKERS[NEXT_DISLIKE]))
    mask = torch.zeros_like(prompts)
    for row, tokens in enumerate(ours.tokens.split(ours.prefix.tolist())):
        prompts[row, -len(tokens) - 1 : -1], mask[row, -len(tokens) - 1 :] = tokens, 1
    return {
        "prompt_ids": prompts.repeat_interleave(group, 0),
        "prompt_mask": mask.repeat_interleave(group, 0),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
    }
