"""``modules.side_vit`` of the authors' code: the side network, named as there."""

import torch
from torch import Tensor

from fpt_fast.compat.vit_layout import ImageClassifierOutput, ViTClassifier, refuse_unsupported


class ViTForImageClassification(ViTClassifier):
    """The authors' side encoder: ``ViTForImageClassification(config)``.

    ``config`` is any object with the attributes of a Hugging Face ``ViTConfig``.  State-dict keys
    and the order of parameters are theirs, so that their weights and optimiser states load.
    """

    def forward(
        self,
        pixel_values: Tensor,
        fine_grained_states: Tensor | None = None,
        head_mask: None = None,
        labels: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput:
        """Return ``.logits`` [B, labels] of ``pixel_values`` [B, 3, h, w].

        ``fine_grained_states`` [L, B, P, S], one entry per layer, or None for the side network
        alone.  Raises ``ValueError`` for shapes that do not fit, and for the arguments
        ``head_mask``, ``labels``, ``output_attentions``, ``output_hidden_states`` and
        ``return_dict=False``, which the authors' scripts never use.
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
        tokens = self.vit.embeddings(pixel_values, bool(interpolate_pos_encoding))
        layers = self.vit.encoder.layers()
        self._check(fine_grained_states, len(tokens))
        for i, layer in enumerate(layers):
            # Prompts are cut off after the layer, and the head reads the class token alone.
            queries = 1 if i == len(layers) - 1 else tokens.shape[1]
            seen = tokens
            if fine_grained_states is not None:
                seen = torch.cat((tokens, fine_grained_states[i]), dim=1)
            attended = layer.attend(*layer.project(seen, queries))
            tokens = layer.complete(tokens[:, :queries], attended)
        return self.classify(tokens)

    def _check(self, states: Tensor | None, batch: int) -> None:
        if states is None:
            return
        layers, width = self.settings.num_hidden_layers, self.settings.hidden_size
        if states.ndim != 4 or (*states.shape[:2], states.shape[3]) != (layers, batch, width):
            raise ValueError(
                f"fine_grained_states must be [{layers}, {batch}, P, {width}] (layers, batch, "
                f"prompts, width), got {tuple(states.shape)}"
            )
