"""Means over seeds, with the intervals that so few of them allow."""

import math
import statistics

# 97.5 % quantiles of Student's t by degrees of freedom; from 10 on the normal's is close
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def with_intervals(measured: list[dict[str, float]]) -> dict[str, float]:
    """Means over repeats and, where there are several, the half widths of 95 % intervals."""
    result = {}
    for name in measured[0]:
        values = [row[name] for row in measured]
        result[name] = statistics.mean(values)
        if len(values) > 1:
            t = STUDENT_T[min(len(values) - 2, len(STUDENT_T) - 1)]
            result[f"± {name}"] = t * statistics.stdev(values) / math.sqrt(len(values))
    return result
