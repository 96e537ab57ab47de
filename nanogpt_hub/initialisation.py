"""First weights: how each lineage draws the parameters of a model that has learned nothing yet.

    model = GPT(config)        # has drawn them already, by `init_weights`, as config.init says

They are no part of what a model with given weights computes, so a change here is no edit of the core (edits/).
"""

import math
from typing import Any

import torch
import torch.nn as nn


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Draws fresh weights for a GPT, the way its config's lineage does. Norms start at one, biases at zero.

    gpt2: normal 0.02, the projections into the residual stream smaller by sqrt(2 n_layer), so that the stream's
    variance does not grow with depth. neox: sqrt(2 / (5 C)) and, into the stream, 2 / (n_layer sqrt(C)) (GPT-NeoX's
    small_init and wang_init). nanochat: uniform with variance 1/C; output projections and head zero, so that the
    untrained model is the identity and its loss exactly ln(V); the embedding normal with variance 1.
    """
    cfg: Any = model.config
    C, L = cfg.n_embd, cfg.n_layer
    std, proj_std = {
        "gpt2": (0.02, 0.02 / math.sqrt(2 * L)),
        "neox": (math.sqrt(2 / (5 * C)), 2 / (L * math.sqrt(C))),
        "nanochat": (1 / math.sqrt(C), 0.0),
    }[cfg.init]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            into_stream = name.endswith("c_proj") or (name == "lm_head" and cfg.init == "nanochat")
            if cfg.init == "nanochat" and not into_stream:
                nn.init.uniform_(module.weight, -math.sqrt(3) * std, math.sqrt(3) * std)
            else:
                nn.init.normal_(module.weight, 0.0, proj_std if into_stream else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 1.0 if cfg.init == "nanochat" and not cfg.tie_word_embeddings else std)
