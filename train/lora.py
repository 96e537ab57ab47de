"""Low-rank adapters (LoRA, arXiv:2106.09685), by peft: a fine-tune that trains about a hundredth of the weights.

    add_adapters(gpt, LoraConfig(rank=8), seed=1337)  # in place: layers get an adapter, all other weights are frozen
    save_model(folder, without_adapters(gpt))         # the folder is an ordinary model's

Gradients and moments are then needed for the adapters alone: a third of the memory, and the base cannot be forgotten.
"""

import importlib.util

import torch

from nanogpt_hub.families import empty_model
from nanogpt_hub.model import GPT
from nanogpt_hub.system.installed import pip_line

from .config import LoraConfig


def check_peft() -> None:
    """Raises ValueError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"lora.rank needs the peft library: run `{pip_line(['peft'])}`, or set it to 0")


def add_adapters(gpt: GPT, config: LoraConfig, seed: int) -> None:
    """Gives the layers named by `config.targets` an adapter of `config.rank` and freezes everything else.

    The model computes the same as before until it is trained. Raises ValueError when it has no such layer.
    """
    import peft

    torch.manual_seed(seed)  # half of each adapter's numbers are drawn
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT says int, and divides it by the rank
        lora_dropout=config.dropout,
        target_modules=[*config.targets],
    )
    peft.inject_adapter_in_model(lora, gpt).train(gpt.training)


@torch.no_grad()
def without_adapters(gpt: GPT) -> GPT:
    """The same model without adapters: what they add is added to the weights. A model without any is returned as it is.

    Weights that have no adapter are shared with `gpt`, not copied.
    """
    if not any(".lora_A." in name for name, _ in gpt.named_parameters()):
        return gpt
    from peft.tuners.lora import LoraLayer

    state = {name.replace(".base_layer.", "."): t for name, t in gpt.state_dict().items() if ".lora_" not in name}
    for name, layer in gpt.named_modules():
        if isinstance(layer, LoraLayer):
            weight = state[f"{name}.weight"]
            delta = layer.get_delta_weight("default")  # type: ignore[attr-defined]  # each kind of layer has it
            state[f"{name}.weight"] = weight + delta.to(weight.dtype)
    plain = empty_model(gpt.config)
    plain.load_state_dict(state, assign=True)
    if gpt.config.tie_word_embeddings:
        plain.lm_head.weight = plain.wte.weight
    return plain.train(gpt.training)
