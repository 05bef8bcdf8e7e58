"""
The statistics of compare.py: from a table of losses, rows (an FFN, a width) x seeds, to each row's
difference to the baseline, and from the baseline's runs of other lengths to what a difference is worth.

A comparison is a randomized block design. Within a seed all rows see the same tokens from the same
shared weights, so loss = row + seed + noise, fitted by least squares to all runs at once, with one
deviation of the noise. Nothing here knows of files or of PyTorch.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import special

FEWEST_SEEDS = 3  # no verdict from fewer
FEWEST_DF = 20  # --precision does not trust a noise from fewer degrees of freedom
DRAWS = 200_000
SHARES = np.linspace(0, 1, DRAWS + 1)  # share of the sorted draws up to each
ODD_NOISE = 0.01  # p of the F-test below which a row's own noise is taken, if it is not the smaller one
ROUNDING = 1e-9  # nats: smaller deviations are rounding
ROUNDS = 15  # of timed steps, from which the ratio of step times and its error come


def two_sided_p(t: float | np.ndarray, df: int) -> float | np.ndarray:
    return 2 * special.stdtr(df, -np.abs(t))


def quantile(level: float, df: int) -> float:
    """Return the t that |t| exceeds with a probability of level."""
    return -float(special.stdtrit(df, level / 2))


@functools.lru_cache(maxsize=2000)
def design(mask: bytes, rows: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Least squares for the n runs that exist. mask: (rows, seeds) booleans, as bytes.

    Returns (residuals, contrasts, degrees of freedom): residuals @ losses are the residuals, (n, n);
    contrasts @ losses are the rows' differences to row 0, (rows, n), nan where no chain of shared
    seeds links a row to row 0."""
    exists = np.frombuffer(mask, bool).reshape(rows, -1)
    i, j = exists.nonzero()
    x = np.hstack([np.eye(rows)[i], np.eye(exists.shape[1])[j]])  # (n, rows + seeds)
    inverse = np.linalg.pinv(x)
    contrasts = inverse[:rows] - inverse[0]
    wanted = np.eye(x.shape[1])[:rows] - np.eye(x.shape[1])[0]
    contrasts[~np.isclose(contrasts @ x, wanted).all(1)] = np.nan
    residuals = np.eye(len(i)) - x @ inverse
    return residuals, contrasts, round(np.trace(residuals))


def fit(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, int]:
    """table: (rows, seeds) losses, nan where there is no run. Returns the differences to row 0, their
    standard errors for noise of deviation 1, the residuals' sum of squares and degrees of freedom."""
    exists = np.isfinite(table)
    residuals, contrasts, df = design(exists.tobytes(), len(table))
    losses = table[exists] - table[exists][:1]  # centred: sums lose no digits
    squares = ((residuals @ losses) ** 2).sum()
    differences = contrasts @ losses if len(losses) else np.full(len(table), np.nan)
    return differences, np.linalg.norm(contrasts, axis=1), float(squares), df


def rows_of_own_noise(table: np.ndarray) -> list[int]:
    """The rows whose noise differs from that of all others by an F-test. The most different one is
    taken out before the others are tested again. All rows, if row 0 is one of them."""
    kept = list(range(len(table)))
    while True:
        _, _, squares, df = fit(table[kept])
        found = [(1.0, -1)]
        for row in kept if len(kept) > 2 else ():
            # What a row adds to the sum of squares is independent of the sum without the row.
            _, _, rest, rest_df = fit(table[[other for other in kept if other != row]])
            if min(rest_df, df - rest_df) > 0:
                own = (squares - rest) / (df - rest_df) + ROUNDING**2
                ratio = own / (rest / rest_df + ROUNDING**2)
                below, above = (f(df - rest_df, rest_df, ratio) for f in (special.fdtr, special.fdtrc))
                found.append((2 * min(below, above), row))
        p, row = min(found)
        if p >= ODD_NOISE:
            return [row for row in range(len(table)) if row not in kept]
        if row == 0:
            return list(range(len(table)))
        kept.remove(row)


@functools.lru_cache(maxsize=200)
def smallest_p(mask: bytes, rows: int, own: int = 0) -> np.ndarray:
    """Return 0 and then 200,000 sorted draws of the smallest p of all rows, for data in which no row
    differs from row 0. This is Dunnett's single step: the rows' t share row 0 and the noise deviation.
    `own` further rows are judged by their own noise."""
    _, contrasts, df = design(mask, rows)
    tested = contrasts[1:][np.isfinite(contrasts[1:]).all(1)] if df > 0 else contrasts[:0]
    if len(tested) + own < 2:
        return SHARES
    rng = np.random.RandomState(0)  # its stream is frozen, the newer Generator's is not
    smallest = rng.random_sample((DRAWS, own)).min(1, initial=1)
    if len(tested):
        unit = tested / np.linalg.norm(tested, axis=1, keepdims=True)
        # By Cholesky, and not by multivariate_normal: the eigenvectors that it uses, and with them the
        # draws, depend on the CPU where eigenvalues are equal.
        factor = np.linalg.cholesky(unit @ unit.T)
        largest = np.abs(rng.standard_normal((DRAWS, len(unit))) @ factor.T).max(1)
        t = largest / np.sqrt(rng.chisquare(df, DRAWS) / df)
        smallest = np.minimum(smallest, two_sided_p(t, df))
    return np.concatenate([[0], np.sort(smallest)])


def analyse(table: np.ndarray) -> tuple[list[dict], dict]:
    """table: (rows, seeds) losses, nan where there is no run; row 0 is the baseline.

    Returns a dict for each row, and the noise: std, df. A row has its difference to row 0, its
    simultaneous 95% interval and adjusted p (None where they cannot be told), the `level` of its test
    (so that all rows together err in 5% of comparisons), `equal` (to row 0 in every seed) and
    `own_noise`, if that differs from the others'. Rows that are equal to each other in every seed are
    judged as one, or their noise would count several times."""
    table, of, gaps = table.copy(), list(range(len(table))), table[:, None] - table
    same = ((gaps == 0) | np.isnan(gaps)).all(2) & (gaps == 0).any(2)
    for j, i in np.argwhere(np.triu(same[1:, 1:], 1)) + 1:
        of[i] = of[j]
        table[of[j]] = np.where(np.isfinite(table[of[j]]), table[of[j]], table[i])
    if len(kept := sorted(set(of))) < len(of):
        results, noise = analyse(table[kept])
        return [dict(results[kept.index(row)]) for row in of], noise
    pairs = [(row - table[0])[np.isfinite(row - table[0])] for row in table]
    equal = [i > 0 and len(d) > 0 and not d.any() for i, d in enumerate(pairs)]
    different = [i for i in range(len(table)) if not equal[i]]
    odd = {different[i] for i in rows_of_own_noise(table[different])} - {0}
    pooled = [i for i in different if i not in odd]
    differences, errors, squares, df = fit(table[pooled])
    std = math.sqrt(squares / df + ROUNDING**2) if df else None
    draws = smallest_p(np.isfinite(table[pooled]).tobytes(), len(pooled), len(odd))
    level = float(draws[DRAWS // 20])
    results = []
    for i, d in enumerate(pairs):
        result = dict.fromkeys(("difference", "low", "high", "p", "level", "own_noise"))
        result["equal"] = equal[i]
        results.append(result)
        error, freedom = None, df
        if equal[i]:
            result |= {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "level": level}
        elif i in odd and len(d):
            result["difference"] = float(d.mean())
            if len(d) > 1:
                error, freedom = float(d.std(ddof=1)) / math.sqrt(len(d)), len(d) - 1
                result["own_noise"] = error * math.sqrt(len(d) / 2)  # of one run
                if std and std > result["own_noise"]:  # a few differences that happen to be alike
                    error, freedom = std * math.sqrt(2 / len(d)), df
        elif i in pooled and i and np.isfinite(differences[pooled.index(i)]):
            result["difference"] = float(differences[pooled.index(i)])
            error = std and std * errors[pooled.index(i)]
        if error:
            result["level"], half = level, float(quantile(level, freedom) * error)
            result["low"], result["high"] = result["difference"] - half, result["difference"] + half
            p = two_sided_p(result["difference"] / error, freedom)
            result["p"] = float(np.interp(p, draws, SHARES))
    # Where the baseline is the odd one there is no pooled noise: the fewest degrees of freedom count.
    return results, {"std": std, "df": df or min((len(pairs[i]) - 1 for i in odd), default=0)}


def widest(results: list[dict]) -> float:
    """The largest half-width of the rows that have a difference; infinite where one has no interval."""
    told = [row for row in results if row["difference"] is not None]
    widths = [math.inf if row["high"] is None else row["high"] - row["difference"] for row in told]
    return max(widths, default=math.inf)


def precise(results: list[dict], noise: dict, precision: float) -> bool:
    """Whether no half-width is above precision. Only widths decide, never a difference or its p, and not
    before the noise is known from FEWEST_DF degrees of freedom: stopping where a noise from fewer
    happens to be small makes up to twice as many errors as the 5% allowed. With FEWEST_DF one row errs
    in 5.0% to 5.7% of comparisons, by the precision asked for (simulated)."""
    return widest(results) <= precision and noise["df"] >= FEWEST_DF


def expected_precision(rows: int, seeds: int, noise: float) -> tuple[float, float]:
    """The intervals' half-width for runs of this noise, and the true difference that is
    found with a probability of 0.8."""
    mask = np.ones((rows, seeds), bool).tobytes()
    df, error = design(mask, rows)[2], noise * math.sqrt(2 / seeds)
    edge = quantile(smallest_p(mask, rows)[DRAWS // 20], df)
    return edge * error, (edge + special.stdtrit(df, 0.8)) * error


def verdict(row: dict, baseline_runs: int, doubt: str) -> str:
    """What the interval says, or why it says nothing. row: what analyse finds, and its runs: n that came
    to their end and those that diverged; baseline: whether it is the baseline."""
    if row["diverged"]:
        return f"diverged in {row['diverged']} of {row['n'] + row['diverged']}"
    if row["baseline"]:
        return "the baseline"
    if row["difference"] is None:
        return "no run of the baseline with one of its seeds"
    if row["equal"]:
        return "identical"
    if row["low"] is None or min(row["n"], baseline_runs) < FEWEST_SEEDS:
        return "too few seeds"
    if doubt:
        return doubt
    if row["low"] <= 0 <= row["high"]:
        return "no difference shown"
    return "better" if row["difference"] < 0 else "worse"


def exchange_rate(runs: list[tuple[int, object, float]]) -> dict | None:
    """The baseline's loss as a line in log(tokens) with a level for each seed, by least squares over
    runs (tokens, seed, loss) of all lengths: the slope, its standard error and degrees of freedom, and
    each length's loss and distance to the line, without the seeds of one length, through which any line
    goes. None where the runs do not tell a slope."""
    seeds = [seed for _, seed, _ in runs]
    runs = [run for run in runs if seeds.count(run[1]) > 1]
    levels, tokens = sorted({seed for _, seed, _ in runs}), np.array([n for n, _, _ in runs])
    x = np.array([[*(seed == level for level in levels), math.log(n)] for n, seed, _ in runs])
    y, df = np.array([loss for _, _, loss in runs]), len(runs) - len(levels) - 1
    if df < 1 or np.linalg.matrix_rank(x) < len(levels) + 1:
        return None
    line = np.linalg.lstsq(x, y, rcond=None)[0]
    off = y - x @ line
    variance = off @ off / df * np.linalg.inv(x.T @ x)[-1, -1]
    lengths = [(int(n), tokens == n) for n in sorted(set(tokens))]
    horizons = [{"tokens": n, "n": int(here.sum()), "val_loss": float(y[here].mean()),
                 "off_line": float(off[here].mean())} for n, here in lengths]  # fmt: skip
    error = math.sqrt(variance)
    return {"slope": float(line[-1]), "std_error": error, "df": df, "horizons": horizons}


def price(row: dict, exchange: dict | None, step: dict | None) -> dict:
    """How many times the baseline's tokens, and its time, a row needs to reach the baseline's loss:
    exp(difference / -slope), and that times the step time. The interval of tokens is Fieller's, which
    lies on one side of 1 exactly where the difference's lies on one side of 0."""
    keys = [f"{what}_{end}" for what in ("tokens", "time") for end in ("ratio", "low", "high")]
    found = dict.fromkeys(keys)
    if exchange is None or row["low"] is None:
        return found
    d, half, fall = row["difference"], row["high"] - row["difference"], -exchange["slope"]
    unsure = quantile(row["level"], exchange["df"]) * exchange["std_error"]
    scale = fall**2 - unsure**2
    if fall <= 0 or scale <= 0:  # the loss does not surely fall with more tokens
        return found
    root = math.sqrt(half**2 * scale + (unsure * d) ** 2)
    middle, low, high = d / fall, (d * fall - root) / scale, (d * fall + root) / scale
    logs = [middle, low, high]
    if step:  # the two errors are independent: the squared distances to the ends add up
        own = quantile(row["level"], ROUNDS - 1) * step["std_error"]
        center = middle + math.log(step["ratio"])
        logs += [center, center - math.hypot(middle - low, own), center + math.hypot(high - middle, own)]
    return found | {key: math.exp(min(x, 700)) for key, x in zip(keys, logs)}
