"""The ops: one name each for schema, oracle, implementations, test, benchmark and docs.

Importing registers their schemas with torch and nothing more; implementations are imported
when they first run.
"""

from fpt_fast.ops.attention import attention_with_scores, scores_come_free
from fpt_fast.ops.frozen_attention import frozen_attention
from fpt_fast.ops.frozen_linear import frozen_linear
from fpt_fast.ops.implementation import explain
from fpt_fast.ops.prompt_attention import prompt_attention, prompt_attention_indexed
from fpt_fast.ops.quantise_kv import dequantise_kv, quantise_kv
from fpt_fast.ops.select_tokens import select_tokens
from fpt_fast.ops.side_attention import side_attention
from fpt_fast.ops.side_layers import SideWeights, side_layers
from fpt_fast.ops.token_scores import token_scores
from fpt_fast.ops.trained_linear import trained_linear

__all__ = [
    "SideWeights",
    "attention_with_scores",
    "dequantise_kv",
    "explain",
    "frozen_attention",
    "frozen_linear",
    "prompt_attention",
    "prompt_attention_indexed",
    "quantise_kv",
    "scores_come_free",
    "select_tokens",
    "side_attention",
    "side_layers",
    "token_scores",
    "trained_linear",
]
