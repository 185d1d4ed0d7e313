"""Every ``align/*`` metric of docs/metrics.md over tokens that pass by once, and the worst of them.

The same numbers as ``rlalign.verifier.metrics`` on the whole, whatever the order of the sequences: counts, sums, means
and maxima are exact; percentiles are exact up to 2**20 tokens (``Quantiles``); deviations and the correlation come from
exact sums of products that are rounded once each, which costs about 1e-16 of the mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlalign.verifier.stream.pieces import Piece, Sides, flatten
from rlalign.verifier.stream.sums import ExactSum, Quantiles, standard_deviation, to_float, variance
from rlalign.verifier.stream.worst import TokenDifference, WorstTokens

_PIECE_TOKENS = 1 << 16
_SUMS = """delta size size2 pdiff pdiff2 px py px2 py2 pxy k3 mult chi2 ratio ppl_train ppl_rollout ppl_ratio log_ppl
chi2_seq""".split()
# ρ is summed as exp(Δ - 256 b) by b = round(Δ / 256): neither it nor its square then leaves float64's range
_BLOCK = 256.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found. metrics: ``align/*``. worst: the worst tokens that have both sides, worst first.

    nonfinite_count: of log-probs that are missing or not finite; train_nonfinite_count: of them those that only train's
    side has wrong.
    """

    num_sequences: int
    num_tokens: int
    mismatch_count: int
    nonfinite_count: int
    missing_count: int
    metrics: dict[str, float]
    worst: tuple[TokenDifference, ...]
    train_nonfinite_count: int = 0

    @property
    def equal(self) -> bool:
        """True if something was compared and every token is finite and bitwise equal."""
        return self.num_tokens > 0 and self.mismatch_count == 0 and self.nonfinite_count == 0


class Tally:
    """Takes sequences one by one; ``outcome`` may be asked for at any time.

    worst: how many of the worst tokens to keep. watch: called with every piece of about 65,000 tokens, for pictures.
    """

    def __init__(self, *, worst: int = 10, watch: Callable[[Piece], None] | None = None) -> None:
        self._waiting: list[Sides] = []
        self._waiting_tokens = 0
        self._watch = watch
        self._worst = WorstTokens(worst)
        self._sums = {name: ExactSum() for name in _SUMS}
        self._ratios: dict[int, tuple[ExactSum, ExactSum]] = {}
        self._quantiles = {"size": Quantiles(), "ulp": Quantiles()}
        self._max = {name: -math.inf for name in ("size", "ulp", "pdiff", "k3", "ratio", "px", "py")}
        self._min = {name: math.inf for name in ("ratio", "px", "py")}
        self._num_sequences = self._num_tokens = self._mismatch = self._missing = 0
        self._nonfinite = self._train_nonfinite = 0

    def add(self, sides: Sides) -> None:
        """Count one sequence."""
        self._num_sequences += 1
        self._waiting.append(sides)
        self._waiting_tokens += len(sides.rollout)
        if self._waiting_tokens >= _PIECE_TOKENS:
            self._flush()

    def outcome(self) -> Outcome:
        """Everything so far."""
        self._flush()
        return Outcome(
            num_sequences=self._num_sequences,
            num_tokens=self._num_tokens,
            mismatch_count=self._mismatch,
            nonfinite_count=self._nonfinite,
            missing_count=self._missing,
            metrics=self._metrics(),
            worst=self._worst.read(),
            train_nonfinite_count=self._train_nonfinite,
        )

    def _flush(self) -> None:
        sides, self._waiting, self._waiting_tokens = self._waiting, [], 0
        if not sides:
            return
        piece = flatten(sides)
        self._num_tokens += piece.num_tokens
        self._mismatch += int(piece.mismatch.sum())
        self._nonfinite += int(piece.nonfinite.sum())
        self._train_nonfinite += int((piece.nonfinite & ~piece.missing & np.isfinite(piece.rollout)).sum())
        self._missing += int(piece.missing.sum())
        finite = ~piece.nonfinite
        if finite.any():
            self._tokens(piece, finite)
            self._sequences(piece, finite)
        self._worst.add(piece)
        if self._watch is not None:
            self._watch(piece)

    def _tokens(self, piece: Piece, finite: np.ndarray) -> None:
        every = finite.all()
        delta, rollout, train, ulp = (
            values if every else values[finite] for values in (piece.delta, piece.rollout, piece.train, piece.ulp)
        )
        delta = delta.astype(np.float64)
        p_train, p_rollout = np.exp(train.astype(np.float64)), np.exp(rollout.astype(np.float64))
        size, p_diff = np.abs(delta), np.abs(p_train - p_rollout)
        with np.errstate(over="ignore"):
            ratio, k3 = np.exp(delta), np.expm1(delta) - delta
            terms = {
                "delta": delta, "size": size, "size2": size * size, "pdiff": p_diff, "pdiff2": p_diff * p_diff,
                "px": p_train, "py": p_rollout, "px2": p_train * p_train, "py2": p_rollout * p_rollout,
                "pxy": p_train * p_rollout, "k3": k3, "mult": np.exp(size), "chi2": np.expm1(2.0 * delta),
                "ratio": ratio,
            }  # fmt: skip
        for name, values in terms.items():
            self._sums[name].add(values)
        self._quantiles["size"].add(size)
        self._quantiles["ulp"].add(ulp)
        self._ratio_sums(delta)
        extremes = {"size": size, "ulp": ulp, "pdiff": p_diff, "k3": k3, "ratio": ratio, "px": p_train, "py": p_rollout}
        for name, values in extremes.items():
            self._max[name] = max(self._max[name], float(values.max()))
            if name in self._min:
                self._min[name] = min(self._min[name], float(values.min()))

    def _ratio_sums(self, delta: np.ndarray) -> None:
        block = np.rint(delta / _BLOCK)
        for b in np.unique(block).tolist():
            first, squares = self._ratios.setdefault(int(b), (ExactSum(), ExactSum()))
            scaled = np.exp(delta[block == b] - _BLOCK * b)
            first.add(scaled)
            squares.add(scaled * scaled)

    def _sequences(self, piece: Piece, finite: np.ndarray) -> None:
        """Per sequence over its finite tokens, as ``metrics._sequence`` does."""
        rows = []
        for begin, end in zip(piece.bounds[:-1].tolist(), piece.bounds[1:].tolist(), strict=True):
            seen = finite[begin:end]
            if not seen.any():
                continue
            sums = [math.fsum(side[begin:end][seen].tolist()) for side in (piece.train, piece.rollout, piece.delta)]
            count = int(seen.sum())
            rows.append((-sums[0] / count, -sums[1] / count, sums[2]))
        train, rollout, log_ratio = np.array(rows).T
        with np.errstate(over="ignore"):
            columns = {
                "ppl_train": np.exp(train), "ppl_rollout": np.exp(rollout), "ppl_ratio": np.exp(train - rollout),
                "log_ppl": np.abs(train - rollout), "chi2_seq": np.expm1(2.0 * log_ratio),
            }  # fmt: skip
        for name, values in columns.items():
            self._sums[name].add(values)

    def _metrics(self) -> dict[str, float]:
        mean = {name: total.mean for name, total in self._sums.items()}
        most = {name: value if self._sums["size"].count else math.nan for name, value in self._max.items()}
        values = {
            "mismatch_count": float(self._mismatch),
            "nonfinite_count": float(self._nonfinite),
            "bitwise_match_frac": (self._num_tokens - self._mismatch) / self._num_tokens
            if self._num_tokens
            else math.nan,
            "logp_diff/mean": mean["delta"],
            "logp_abs_diff/mean": mean["size"],
            "logp_abs_diff/std": standard_deviation(self._sums["size"], self._sums["size2"]),
            "logp_abs_diff/p50": self._quantiles["size"].read(50),
            "logp_abs_diff/p99": self._quantiles["size"].read(99),
            "logp_abs_diff/max": most["size"],
            "ulp/p99": self._quantiles["ulp"].read(99),
            "ulp/max": most["ulp"],
            "prob_abs_diff/mean": mean["pdiff"],
            "prob_abs_diff/std": standard_deviation(self._sums["pdiff"], self._sums["pdiff2"]),
            "prob_abs_diff/max": most["pdiff"],
            "prob_pearson": self._pearson(),
            "k1": -mean["delta"],
            "k3": mean["k3"],
            "k3_max": most["k3"],
            "mult_prob_error": mean["mult"],
            "chi2/token": mean["chi2"],
            "ratio_raw/min": self._min["ratio"] if self._sums["size"].count else math.nan,
            "ratio_raw/mean": mean["ratio"],
            "ratio_raw/max": most["ratio"],
            "ess": self._ess(),
            "ppl/train": mean["ppl_train"],
            "ppl/rollout": mean["ppl_rollout"],
            "ppl/ratio": mean["ppl_ratio"],
            "log_ppl_abs_diff": mean["log_ppl"],
            "chi2/seq": mean["chi2_seq"],
        }
        if self._nonfinite:
            values |= {name: math.inf for name in values if name.endswith(("/max", "_max"))}
        return {f"align/{name}": value for name, value in values.items()}

    def _pearson(self) -> float:
        x, y = ((self._sums[name], self._sums[f"{name}2"]) for name in ("px", "py"))
        if not x[0].count:
            return math.nan
        if self._max["pdiff"] == 0:
            return 1.0  # points on the diagonal, also when all of them are the same point
        if any(self._min[name] == self._max[name] for name in ("px", "py")):
            return math.nan
        n = x[0].count
        both = self._sums["pxy"].exact / n - (x[0].exact / n) * (y[0].exact / n)
        spread = math.sqrt(to_float(variance(*x))) * math.sqrt(to_float(variance(*y)))
        return to_float(both) / spread if spread > 0 else math.nan

    def _ess(self) -> float:
        if not self._ratios:
            return math.nan
        top = max(self._ratios)
        with np.errstate(under="ignore"):
            scales = {b: float(np.exp(_BLOCK * (b - top))) for b in self._ratios}
        first = math.fsum(total.value * scales[b] for b, (total, _) in self._ratios.items())
        squares = math.fsum(total.value * scales[b] ** 2 for b, (_, total) in self._ratios.items())
        return first * first / (self._sums["size"].count * squares)
