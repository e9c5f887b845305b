"""The distillation losses in float64 numpy, from their formulas, position by position."""

import numpy as np


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(target, log_target, log_other):
    """KL of one distribution; what has no probability adds nothing."""
    return sum(
        p * (log_p - log_q)
        for p, log_p, log_q in zip(target, log_target, log_other, strict=True)
        if p > 0
    )


def kl(student, teacher, smoothing=0.0):
    log_student, log_teacher = log_softmax(student), log_softmax(teacher)
    target = (1 - smoothing) * np.exp(log_teacher) + smoothing / len(teacher)
    log_target = np.log(target) if smoothing else log_teacher
    return divergence(target, log_target, log_student)


def cross_entropy(student, teacher, smoothing=0.0):
    target = (1 - smoothing) * np.exp(log_softmax(teacher)) + smoothing / len(teacher)
    return -(target * log_softmax(student)).sum()


def reverse_kl(student, teacher):
    return kl(teacher, student)


def jensen_shannon(student, teacher, beta=0.5):
    log_student, log_teacher = log_softmax(student), log_softmax(teacher)
    with np.errstate(divide="ignore"):
        log_mixture = np.logaddexp(np.log(beta) + log_teacher, np.log(1 - beta) + log_student)
    of_teacher = divergence(np.exp(log_teacher), log_teacher, log_mixture)
    of_student = divergence(np.exp(log_student), log_student, log_mixture)
    return beta * of_teacher + (1 - beta) * of_student


def decoupled(student, teacher, target, alpha, beta):
    log_student, log_teacher = log_softmax(student), log_softmax(teacher)
    others = [index for index in range(len(student)) if index != target]

    def pair(log):
        return np.array([log[target], np.logaddexp.reduce(log[others])])

    target_part = divergence(np.exp(pair(log_teacher)), pair(log_teacher), pair(log_student))
    return alpha * target_part + beta * kl(student[others], teacher[others])


def batch_mean(per_position, student, teacher, temperature, *more, **options):
    """Mean of T^2 * per_position(student / T, teacher / T), looping over the positions."""
    shape = student.shape[:-1]
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), shape)
    values = [
        temperature[index] ** 2
        * per_position(
            student[index] / temperature[index],
            teacher[index] / temperature[index],
            *(item[index] for item in more),
            **options,
        )
        for index in np.ndindex(shape)
    ]
    return float(np.mean(values))


def dist(student, teacher, beta, gamma, temperature):
    classes = student.shape[-1]
    left, right = (
        np.exp(log_softmax(item / temperature)).reshape(-1, classes) for item in (student, teacher)
    )
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(left, right, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(left.T, right.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def attention_transfer(student, teacher):
    total, count = 0.0, 0
    for of_student, of_teacher in zip(student, teacher, strict=True):
        maps = [(item**2).mean(0).ravel() for item in (of_student, of_teacher)]
        norms = [np.sqrt((item**2).sum()) for item in maps]
        left, right = (
            item / norm if norm else item for item, norm in zip(maps, norms, strict=True)
        )
        total, count = total + ((left - right) ** 2).sum(), count + left.size
    return total / count


def smooth_l1(difference):
    difference = abs(difference)
    return difference**2 / 2 if difference < 1 else difference - 0.5


def rkd_distance(student, teacher):
    matrices = []
    for rows in (student, teacher):
        size = len(rows)
        distances = np.array(
            [[np.sqrt(((rows[i] - rows[j]) ** 2).sum()) for j in range(size)] for i in range(size)]
        )
        positive = distances[distances > 0]
        matrices.append(distances / positive.mean() if positive.size else distances)
    return np.mean([smooth_l1(a - b) for a, b in zip(*(m.ravel() for m in matrices), strict=True)])


def rkd_angle(student, teacher):
    def cosine(rows, i, j, k):
        left, right = rows[j] - rows[i], rows[k] - rows[i]
        norms = np.sqrt((left**2).sum() * (right**2).sum())
        return (left * right).sum() / norms if norms else 0.0

    size = len(student)
    return np.mean(
        [
            smooth_l1(cosine(student, *index) - cosine(teacher, *index))
            for index in np.ndindex(size, size, size)
        ]
    )


def similarity_preserving(student, teacher):
    total, size = 0.0, len(student)
    for i in range(size):
        rows = [np.array([item[i] @ item[j] for j in range(size)]) for item in (student, teacher)]
        norms = [np.sqrt((row**2).sum()) for row in rows]
        left, right = (row / norm if norm else row for row, norm in zip(rows, norms, strict=True))
        total += ((left - right) ** 2).sum()
    return total / size**2


def contrastive(student, teacher, temperature):
    def cosine(left, right):
        norm = np.sqrt((left**2).sum() * (right**2).sum())
        return (left * right).sum() / norm if norm else 0.0

    losses = []
    for index, anchor in enumerate(student):
        scores = np.array([cosine(anchor, other) for other in teacher]) / temperature
        losses.append(-log_softmax(scores)[index])
    return np.mean(losses)
