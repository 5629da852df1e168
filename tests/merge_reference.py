"""Merging methods written plainly in numpy, float64, from the formulas of their papers: no code shared with jaxlm."""

import numpy as np


def linear(base, xs, w, normalize=True):
    total = sum(wi * x for wi, x in zip(w, xs, strict=True))
    return total / sum(w) if normalize else total


def task_arithmetic(base, xs, w, scale=1.0, normalize=False):
    return add(base, xs, w, [np.ones(base.shape)] * len(xs), scale, normalize)


def add(base, xs, w, factors, scale, normalize):
    total = sum(wi * f * (x - base) for wi, f, x in zip(w, factors, xs, strict=True))
    return base + scale * total / (sum(w) if normalize else 1)


def elect(base, xs, w, factors, scale, normalize):
    """Coordinate by coordinate."""
    result = base.copy()
    for place in np.ndindex(base.shape):
        parts = [wi * f[place] * (x[place] - base[place]) for wi, f, x in zip(w, factors, xs, strict=True)]
        positive = sum(parts) >= 0
        agree = [i for i, part in enumerate(parts) if (part > 0 if positive else part < 0)]
        total = sum(parts[i] for i in agree)
        if normalize and agree:
            total /= sum(abs(w[i]) for i in agree)
        result[place] += scale * total
    return result


def largest(d, density):
    """1 for the int(density * n) largest magnitudes, at least one; no ties in the tests."""
    keep = np.zeros(d.size)
    keep[np.argsort(-abs(d), axis=None)[: max(1, int(density * d.size + 1e-3))]] = 1
    return keep.reshape(d.shape)


def without_outliers(d, density, gamma):
    order = np.argsort(-abs(d), axis=None)
    wanted = max(1, int(density * d.size + 1e-3))
    first = min(int(gamma * d.size + 1e-3), d.size - wanted)
    keep = np.zeros(d.size)
    keep[order[first: first + wanted]] = 1
    return keep.reshape(d.shape)


def ties(base, xs, w, density=1.0, scale=1.0, normalize=True):
    return elect(base, xs, w, [largest(x - base, density) for x in xs], scale, normalize)


def breadcrumbs(base, xs, w, density=1.0, gamma=0.01, scale=1.0, normalize=False):
    return add(base, xs, w, [without_outliers(x - base, density, gamma) for x in xs], scale, normalize)


def breadcrumbs_ties(base, xs, w, density=1.0, gamma=0.01, scale=1.0, normalize=False):
    return elect(base, xs, w, [without_outliers(x - base, density, gamma) for x in xs], scale, normalize)


def whole_linear(base, xs, w, scale=1.0, normalize=False, **_):
    """A random method of density 1."""
    return task_arithmetic(base, xs, w, scale, normalize)


def whole_ties(base, xs, w, scale=1.0, normalize=False, **_):
    return elect(base, xs, w, [np.ones(base.shape)] * len(xs), scale, normalize)


def della(base, xs, w, scale=1.0, normalize=True, **_):
    return whole_ties(base, xs, w, scale, normalize)


def model_stock(base, xs, w, row_wise=False):
    if row_wise:
        return np.stack([model_stock(b, rows, w) for b, *rows in zip(base, *xs, strict=True)])
    d = [(x - base).ravel() for x in xs]
    cos = np.mean([d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j])
                   for i in range(len(d)) for j in range(i)])
    n, cos = len(xs), max(cos, 0)
    t = n * cos / (1 + (n - 1) * cos)
    return t * np.mean(xs, axis=0) + (1 - t) * base


def sce(base, xs, w, density=1.0):
    d = np.stack([x - base for x in xs])
    variance = d.var(axis=0)
    order = np.argsort(-variance, axis=None)[: int((variance > 0).sum() * density + 1e-3)]
    selected = np.zeros(base.size)
    selected[order] = 1
    if density < 1:
        d = d * selected.reshape(base.shape)
    own = (d**2).reshape(len(d), -1).mean(axis=1)
    sign = np.where(d.sum(axis=0) >= 0, 1, -1)
    mask = np.sign(d) == sign
    own = own.reshape(-1, *[1] * base.ndim) * mask
    divisor = own.sum(axis=0)
    return base + (own * d).sum(axis=0) / np.where(divisor > 0, divisor, 1)


def ram(base, xs, w, threshold=1e-5):
    return ram_plus(base, xs, w, threshold, 0.0, 0.0)


def ram_plus(base, xs, w, threshold=1e-5, bonus=0.1, bonus_limit=0.2):
    d = np.stack([x - base for x in xs])
    changed = abs(d) > threshold
    count = changed.sum(axis=0)
    result = base.copy()
    for i in range(len(d)):
        shared, alone = (changed[i] & (count > 1)).sum(), (changed[i] & (count == 1)).sum()
        factor = 1 + bonus * min(shared / max(alone, 1), bonus_limit)
        result += np.where(changed[i], np.where(count == 1, factor * d[i], d[i] / np.maximum(count, 1)), 0)
    return result


def arc(a, b, t, chord):
    cos = np.clip(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)
    if abs(cos) > chord:
        return (1 - t) * a + t * b
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def slerp(base, xs, w, t=0.5):
    return arc(*xs, t, 0.9995)


def nuslerp(base, xs, w, row_wise=False):
    origin, t = 0 if base is None else base, w[1] / sum(w)
    a, b = (x - origin for x in xs)
    if row_wise:
        return origin + np.stack([arc(*rows, t, 1 - 1e-6) for rows in zip(a, b, strict=True)])
    return origin + arc(a, b, t, 1 - 1e-6)


def multislerp(base, xs, w):
    origin = 0 if base is None else base
    w, d = np.array(w) / sum(w), [x - origin for x in xs]
    mean = sum(wi * x / np.linalg.norm(x) for wi, x in zip(w, d, strict=True))
    return origin + sum(wi * np.linalg.norm(x) for wi, x in zip(w, d, strict=True)) * mean / np.linalg.norm(mean)


def karcher(base, xs, w, iterations=10):
    """By vectors, where the package computes with inner products."""
    origin = 0 if base is None else base
    w, d = np.array(w) / sum(w), [x - origin for x in xs]
    unit = [x / np.linalg.norm(x) for x in d]
    mean = sum(wi * u for wi, u in zip(w, unit, strict=True))
    mean /= np.linalg.norm(mean)
    for _ in range(iterations):
        step = np.zeros_like(mean)
        for wi, u in zip(w, unit, strict=True):
            angle = np.arccos(np.clip((u * mean).sum(), -1, 1))
            step += wi * angle / np.sin(angle) * (u - np.cos(angle) * mean)
        length = np.linalg.norm(step)
        mean = np.cos(length) * mean + np.sinc(length / np.pi) * step
    return origin + sum(wi * np.linalg.norm(x) for wi, x in zip(w, d, strict=True)) * mean


def nearswap(base, xs, w, t=1e-3):
    a, b = xs
    with np.errstate(divide="ignore"):
        share = np.clip(t / abs(b - a), 0, 1)
    return a + share * (b - a)


REFERENCES = {
    "linear": linear, "task_arithmetic": task_arithmetic, "model_stock": model_stock, "ties": ties,
    "dare_linear": whole_linear, "dare_ties": whole_ties, "della": della, "della_linear": whole_linear,
    "breadcrumbs": breadcrumbs, "breadcrumbs_ties": breadcrumbs_ties, "sce": sce, "ram": ram, "ram_plus": ram_plus,
    "slerp": slerp, "nuslerp": nuslerp, "multislerp": multislerp, "karcher": karcher, "nearswap": nearswap,
}
