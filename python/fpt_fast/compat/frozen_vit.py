"""``modules.frozen_vit`` of the authors' code: the frozen model that returns what it keeps."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fpt_fast.compat.checkpoints import read_state_dict
from fpt_fast.compat.vit_layout import ImageClassifierOutput, ViTClassifier, refuse_unsupported
from fpt_fast.ops import attention_with_scores, select_tokens, token_scores
from fpt_fast.records import Importance

_log = logging.getLogger("fpt_fast")

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# transformers' ViTConfig, where config.json leaves it out.
_VIT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}


class ViTForImageClassification(ViTClassifier):
    """The authors' frozen encoder: ``ViTForImageClassification(config)``.

    Besides the attributes of a Hugging Face ``ViTConfig``, ``config`` needs those that the
    authors' ``build_frozen_encoder`` sets: ``layers_to_extract`` (layer numbers), ``token_ratio``
    and ``token_imp`` (``"global"`` or ``"class_token"``).  It is frozen: a call records no
    gradient.
    """

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.layers_to_extract = _read_layers(config, self.settings.num_hidden_layers)
        self.token_ratio = float(_read(config, "token_ratio"))
        self.token_imp = _check_importance(_read(config, "token_imp"))
        self.has_dropout = bool(
            self.settings.hidden_dropout_prob or self.settings.attention_probs_dropout_prob
        )

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        head_mask: None = None,
        labels: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[ImageClassifierOutput, Tensor, Tensor]:
        """Return ``(output, key_states, value_states)`` of ``pixel_values`` [B, 3, h, w].

        ``output.logits`` is [B, labels]; ``key_states`` and ``value_states`` are [L, B, H, K, D]
        in ascending order of tokens (the authors': best first; the model does not see the
        order).  Selection runs in extracted layers only, and no attention map is stored.  Raises
        ``ValueError`` like ``side_vit``, and in training mode with dropout.
        """
        refuse_unsupported(
            self.config,
            {
                "head_mask": head_mask,
                "labels": labels,
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
                "return_dict": return_dict,
            },
        )
        if self.training and self.has_dropout:
            raise ValueError(
                "the frozen model must be in evaluation mode, since its config has dropout; "
                "call .eval() on it"
            )
        tokens = self.vit.embeddings(pixel_values, bool(interpolate_pos_encoding))
        length = tokens.shape[1]
        keep = _keep_count(self.token_ratio, length)
        layers = self.vit.encoder.layers()
        kept: list[Tensor] = []
        for i, layer in enumerate(layers):
            extracted, last = i in self.layers_to_extract, i == len(layers) - 1
            # The head reads the class token alone; only scores need the last layer's other queries.
            q, k, v = layer.project(tokens, 1 if last and not extracted else length)
            if extracted and not last and self.token_imp == "global":
                output, scores, _ = attention_with_scores(q, k, v)
                assert output is not None  # asked for, by default
                attended = output
            else:
                attended = layer.attend(q[:, :, :1] if last else q, k, v)
                scores = token_scores(q, k, importance=self.token_imp) if extracted else None
            if scores is not None:
                kept.append(select_tokens(scores, k, v, keep)[0])
            tokens = layer.complete(tokens[:, : attended.shape[2]], attended)
        kv = torch.stack(kept)  # [L, B, 2, H, K, D]
        return self.classify(tokens), kv[:, :, 0].contiguous(), kv[:, :, 1].contiguous()

    @classmethod
    def from_pretrained(cls, path: str | Path, config: object | None = None) -> Self:
        """Load a Hugging Face ViT directory (``config.json`` and weights), in evaluation mode.

        ``path`` may also be a hub name, where the package huggingface-hub is installed and the
        hub can be reached.  ``config`` is the directory's own, from ``read_config_file``, when
        None, and then lacks the three attributes that this class needs.  Weights may lack the
        classifier (a new one is drawn, with a warning) and the prefix ``vit.``, and may have a
        pooler, which is left out; anything else missing, unexpected or of another shape is a
        ``ValueError`` that names it.
        """
        folder = _resolve(path)
        model = cls(read_config_file(folder) if config is None else config)
        weights = _read_weights(folder)
        expected = model.state_dict()
        lacking = [name for name in ("classifier.weight", "classifier.bias") if name in expected]
        if lacking and not any(name in weights for name in lacking):
            _log.warning("%s has no classifier: its logits are those of a random one", folder)
            weights |= {name: expected[name] for name in lacking}
        problems = [f"missing {name}" for name in expected if name not in weights]
        problems += [f"unexpected {name}" for name in weights if name not in expected]
        problems += [
            f"{name} must be {tuple(expected[name].shape)}, got {tuple(weights[name].shape)}"
            for name in expected
            if name in weights and weights[name].shape != expected[name].shape
        ]
        if problems:
            raise ValueError(f"{folder} does not fit its config: " + "; ".join(problems))
        model.load_state_dict(weights)
        return model.eval()


def important_token_selection(
    key_layer: Tensor,
    value_layer: Tensor,
    attention_probs: Tensor,
    token_ratio: float,
    token_imp: str,
) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[B, H, K, D]`` of the most attended tokens, in ascending order.

    ``key_layer``, ``value_layer`` [B, H, N, D]; ``attention_probs`` [B, H, N, N] after the
    softmax; ``K = int(token_ratio * N)``.  ``token_imp`` is ``"global"`` (mean over all queries)
    or ``"class_token"`` (the first row).  Raises ``ValueError`` for other names, or where nothing
    would be kept.
    """
    if _check_importance(token_imp) == "global":
        scores = attention_probs.mean(dim=-2)
    else:
        scores = attention_probs[:, :, 0]
    keep = _keep_count(token_ratio, attention_probs.shape[-1])
    kv, _ = select_tokens(scores.float(), key_layer, value_layer, keep)
    return kv[:, 0], kv[:, 1]


def read_config_file(path: str | Path) -> SimpleNamespace:
    """Read ``config.json`` of a Hugging Face ViT into a fresh object with its attributes.

    ``path`` is a directory or a hub name, as for ``from_pretrained``.  ``num_labels`` is counted
    from ``id2label``.  Raises ``FileNotFoundError``, or ``ValueError`` where it is not a ViT's
    configuration.
    """
    path = _resolve(path) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type", "vit") != "vit":
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} must have model_type 'vit', got {found!r}")
    labels = values.get("id2label")
    if isinstance(labels, dict):
        values["num_labels"] = len(labels)
    return SimpleNamespace(**{**_VIT_BASE, **values})


def _read(config: object, name: str) -> Any:
    if not hasattr(config, name):
        raise ValueError(
            f"config must have the attribute {name}; set config.layers_to_extract, "
            "config.token_ratio and config.token_imp before building the frozen model"
        )
    return getattr(config, name)


def _read_layers(config: object, depth: int) -> tuple[int, ...]:
    layers = tuple(sorted(set(_read(config, "layers_to_extract"))))
    if not layers or not all(isinstance(i, int) and 0 <= i < depth for i in layers):
        raise ValueError(
            f"config.layers_to_extract must be layer numbers in 0..{depth - 1}, got "
            f"{_read(config, 'layers_to_extract')!r}"
        )
    return layers


def _check_importance(name: str) -> Importance:
    if name == "global":
        return "global"
    if name == "class_token":
        return "class_token"
    raise ValueError(f"token_imp must be 'global' or 'class_token', got {name!r}")


def _keep_count(token_ratio: float, num_tokens: int) -> int:
    keep = int(num_tokens * token_ratio)
    if not 1 <= keep <= num_tokens:
        raise ValueError(
            f"token_ratio must keep between 1 and {num_tokens} tokens, got {token_ratio}, which "
            f"keeps {keep}"
        )
    return keep


def _resolve(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{path} is not a directory; to load it by its hub name, install fpt-fast[hub]"
        ) from None
    return Path(snapshot_download(str(path), allow_patterns=["config.json", *_WEIGHTS]))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} must hold one of {', '.join(_WEIGHTS)}")
    if found.suffix == ".safetensors":
        try:
            weights = load_file(found)
        except SafetensorError as error:
            raise ValueError(f"{found} is not a sound file of weights: {error}") from error
    else:
        weights = read_state_dict(found)
    if not any(name.startswith("vit.") for name in weights):
        weights = {
            name if name.startswith("classifier.") else f"vit.{name}": tensor
            for name, tensor in weights.items()
        }
    return {name: t for name, t in weights.items() if not name.startswith("vit.pooler.")}
