"""Distillation losses: pure functions on tensors that return a scalar.

Logits are (*, classes) with the classes last. A logit loss is the mean over all other positions
("batch mean") times temperature^2, so that gradients keep their size when the temperature changes
(Hinton et al. 2015, section 2). Features and embeddings are (N, *) with the samples first.

Every loss is computed and returned in float32 at least, also under autocast; gradients come back
in the student's dtype. No gradient flows into the teacher, nor into a temperature. Logits and
features have to be finite; only positions that a mask leaves out may hold anything.

Where a loss compares samples with one another (`dist_loss`, `rkd_distance_loss`,
`rkd_angle_loss`, `similarity_preserving_loss`, `contrastive_loss`), splitting a batch changes it.
Each other loss of a batch is the mean of its samples' losses; the token losses take `num_items`, so
that the parts of an accumulated batch add up to it.
"""

from compression_plugins.distillation.losses.contrastive import contrastive_loss
from compression_plugins.distillation.losses.decoupled import dkd_loss
from compression_plugins.distillation.losses.divergences import (
    jensen_shannon_loss,
    reverse_kl_loss,
)
from compression_plugins.distillation.losses.features import (
    attention_transfer_loss,
    hint_loss,
    l1_loss,
)
from compression_plugins.distillation.losses.logits import (
    dist_loss,
    kd_loss,
    mse_loss,
    soft_cross_entropy,
)
from compression_plugins.distillation.losses.relations import (
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from compression_plugins.distillation.losses.tokens import (
    token_jensen_shannon_loss,
    token_kl_loss,
    token_reverse_kl_loss,
)

__all__ = [
    "kd_loss",
    "soft_cross_entropy",
    "mse_loss",
    "dkd_loss",
    "dist_loss",
    "reverse_kl_loss",
    "jensen_shannon_loss",
    "token_kl_loss",
    "token_reverse_kl_loss",
    "token_jensen_shannon_loss",
    "hint_loss",
    "l1_loss",
    "attention_transfer_loss",
    "rkd_distance_loss",
    "rkd_angle_loss",
    "similarity_preserving_loss",
    "contrastive_loss",
]
