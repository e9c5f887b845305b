"""Formulas and sources of everything that can be distilled, for docs/generate_distillation.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What the code does not say in a form for a table.

    Attributes:
        name: in configs.
        formula: in the page's notation.
        source: paper or system, and the place in it.
        measured: names of the study's strategies that show its effect.
        same_as: why it needs no figure of its own, where it must have the same effect as another.
    """

    name: str
    formula: str
    source: str
    measured: tuple[str, ...] = ()
    same_as: str = ""


_HINTON = "Hinton, Vinyals, Dean 2015, section 2"
_MINILLM = "Gu et al. 2024 (MiniLLM), equation 1"
_AGARWAL = "Agarwal et al. 2024 (on-policy distillation), section 2"
_INC = "Intel Neural Compressor"

LOGITS = (
    Row(
        "KL",
        "T² · mean KL(q || p_s), q = (1 - e) p_t + e / classes",
        f"{_HINTON}; smoothing e: Szegedy et al. 2016, section 7",
        ("KL", "KL_label_smoothing"),
    ),
    Row("CE", "T² · mean of -sum q log p_s; gradient as of `KL`", f"{_HINTON}", ("CE",)),
    Row(
        "MSE",
        "mean (z_s - z_t)² over all elements; T has no effect",
        "Ba, Caruana 2014, regression on logits, as a mean",
        ("MSE_logits",),
    ),
    Row(
        "DKD",
        "T² · mean (alpha TCKD + beta NCKD); TCKD: KL of (target, all others); NCKD: KL of the "
        "softmax without the target",
        "Zhao et al. 2022, equations 6 and 7; T² as in the authors' code, the target left out "
        "exactly",
        ("DKD",),
    ),
    Row(
        "DIST",
        "T² · (beta (1 - mean Pearson of rows) + gamma (1 - mean Pearson of columns)) of p",
        "Huang et al. 2022, section 3; T² as in the authors' code",
        ("DIST",),
    ),
    Row("reverse_KL", "T² · mean KL(p_s || p_t)", f"{_MINILLM}, per position", ("reverse_KL",)),
    Row(
        "JS",
        "T² · mean (beta KL(p_t || m) + (1 - beta) KL(p_s || m)), m = beta p_t + (1 - beta) p_s",
        _AGARWAL,
        ("JS",),
    ),
    Row(
        "contrastive",
        "mean over i of -log(exp(c_ii / T) / sum_j exp(c_ij / T)), c_ij = cosine of student i and "
        "teacher j; no T²",
        "van den Oord et al. 2018, equation 4; cosine: Chen et al. 2020 (NT-Xent), equation 1",
        ("contrastive",),
    ),
)

LAYERS = (
    Row(
        "MSE",
        "mean (s - t)² over all elements",
        "Romero et al. 2015 (FitNets), equation 3, as a mean",
        ("MSE_hint", "KL_and_hint"),
    ),
    Row("L1", "mean of the absolute s - t over all elements", f"option of {_INC}", ("L1_hint",)),
    Row(
        "attention_transfer",
        "mean (A_s - A_t)², A = mean over channels of squares, flattened, L2-normalized per sample",
        "Zagoruyko, Komodakis 2017, equation 2; mean as in the authors' code",
        ("attention_transfer",),
    ),
    Row(
        "similarity_preserving",
        "sum (G_s - G_t)² / N², G = Gram matrix of the samples, rows L2-normalized",
        "Tung, Mori 2019, equations 2 to 4",
        ("similarity_preserving",),
    ),
    Row(
        "rkd_distance",
        "mean over N x N of smooth L1 between distances, each over the mean of those above 0",
        "Park et al. 2019, section 3, distance-wise; mean as in the authors' code",
        ("rkd_distance",),
    ),
    Row(
        "rkd_angle",
        "mean over N x N x N of smooth L1 between cosines of the angle at i between j and k",
        "Park et al. 2019, section 3, angle-wise; mean as in the authors' code",
        ("rkd_angle",),
    ),
    Row(
        "contrastive",
        "as above, of features; T is `temperature` of the criterion",
        "as above",
        ("contrastive_features",),
    ),
)

SELF = (
    Row(
        "self_distillation",
        "task loss + sum of w_g · D_g(shallow layer, deep layer), within the student",
        f"Zhang et al. 2019 (Be Your Own Teacher), section 3; names: {_INC}",
        ("self_distillation",),
    ),
)

# The study's student answers once for each image: a sequence of one token.
ONE_TOKEN = "that of `{}` of logits: with one token for each sample they are equal"

TOKENS = (
    Row(
        "forward_kl",
        "sum over counted tokens of T² KL(p_t || p_s), over `num_items`",
        f"{_HINTON}, at each token",
        ("KL",),
        same_as=ONE_TOKEN.format("KL"),
    ),
    Row(
        "reverse_kl",
        "the same with KL(p_s || p_t)",
        f"{_MINILLM}, at each token",
        ("reverse_KL",),
        same_as=ONE_TOKEN.format("reverse_KL"),
    ),
    Row(
        "jensen_shannon",
        "the same with beta KL(p_t || m) + (1 - beta) KL(p_s || m)",
        f"{_AGARWAL}, at each token",
        ("JS",),
        same_as=ONE_TOKEN.format("JS"),
    ),
)

SCHEDULES = (
    Row("linear", "start + (end - start) · progress", "ours", ("KL_linear_temperature",)),
    Row(
        "cosine",
        "start + (end - start) · (1 - cos(pi · progress)) / 2",
        "ours; the shape of Loshchilov, Hutter 2017 (SGDR)",
        ("KL_cosine_temperature",),
    ),
    Row(
        "curriculum",
        "a value for each stage, between given steps",
        "ours",
        ("KL_curriculum_weight",),
    ),
    Row(
        "adaptive",
        "low + (high - low) · c per sample; c: the teacher's confidence or entropy, from 0 to 1",
        "ours",
        ("KL_adaptive_temperature",),
    ),
)

TEACHERS = (
    Row(
        'teacher_outputs="model"',
        "the output of `teacher_model`, run in eval mode without gradient",
        _HINTON,
        ("KL",),
    ),
    Row(
        'teacher_outputs="caller"',
        "`teacher_output` of `on_after_compute_loss`",
        _INC,
        ("caller_outputs",),
    ),
    Row(
        'teacher_outputs="ema"',
        "average = d · average + (1 - d) · weights after each step, d = min(`ema_decay`, "
        "n / (n + 1))",
        "Tarvainen, Valpola 2017 (mean teacher), section 2 and their code",
        ("moving_average",),
    ),
    Row(
        "EnsembleTeacher",
        "`average`: sum w_i p_i; `geometric`: proportional to exp(sum w_i log p_i); `maximum`; "
        "`median`",
        "Hinton et al. 2015, section 1; You et al. 2017; Hinton 1999",
        ("ensemble",),
    ),
    Row(
        "QuantizedTeacher",
        "logits rounded to a grid of `bits`; weights int8 with `weights=True`",
        "AiDotNet's QuantizedTeacherModel",
        ("int8_teacher",),
    ),
    Row(
        "TeacherCache",
        "stored outputs, by `sample_ids`",
        "ours",
        ("KL",),
        same_as="that of the live teacher: with float32 logits the losses are equal bit for bit",
    ),
    Row(
        "TeacherRuntime",
        "the same teacher in another precision, or compiled",
        "ours",
        ("bfloat16_teacher",),
    ),
)
