"""LoRA through peft: low-rank adapters on the decoder's linear layers; all else of the decoder is frozen.

The code block is no part of the decoder and stays fully trained.
"""

from negfast.config import Model
from negfast.errors import InputError
from negfast.model.policy import Policy

ALPHA = 16  # what adapters of rank r add is scaled by ALPHA / r (negfast's choice)


def add_adapters(policy: Policy, config: Model) -> None:
    """Adapters of rank ``config.lora_rank``, which change nothing until they are trained; none where it is 0.

    InputError where they are asked for and peft is not installed.
    """
    if not config.lora_rank:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model  # a second of imports that few runs need
    except ImportError as error:
        found = f"model.lora_rank: found {config.lora_rank}, but peft is not installed (pip install 'negfast[lora]')"
        raise InputError(found) from error

    policy.text_head.requires_grad_(False)
    settings = LoraConfig(r=config.lora_rank, lora_alpha=ALPHA, target_modules="all-linear")
    inject_adapter_in_model(settings, policy.decoder)  # freezes what it finds there


def merge_adapters(policy: Policy) -> None:
    """Adds the adapters, if there are any, to the weights beside them and removes them; the decoder trains again."""
    for name, layer in list(policy.decoder.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()  # a layer of peft
            policy.decoder.set_submodule(name, layer.get_base_layer())
    policy.decoder.requires_grad_(True)
    policy.text_head.requires_grad_(True)
