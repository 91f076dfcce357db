"""Time and memory of pictures, edits and answers, beside what this machine reached in the same run.

Seconds, bytes and rates are measured here and now; what is computed instead (the floors) says so.
Read in this order: rates, floors, measuring, works, loss, cost, tables, command.
"""

from .cost import Cost, costs, plot_costs
from .floors import token_bytes, weight_bytes
from .loss import Loss, losses, remark
from .measuring import MEMORY, Row, load
from .rates import Limits, limits
from .tables import blog_table, loss_table, plot_rows, row_table
from .works import Asked, Bench

__all__ = [
    "MEMORY",
    "Asked",
    "Bench",
    "Cost",
    "Limits",
    "Loss",
    "Row",
    "blog_table",
    "costs",
    "limits",
    "load",
    "loss_table",
    "losses",
    "plot_costs",
    "plot_rows",
    "remark",
    "row_table",
    "token_bytes",
    "weight_bytes",
]
