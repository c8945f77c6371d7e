"""Batch normalization for Python arrays, complete and fast."""

from nbbn import constraints, exchange, initializers, nn, regularizers, sync
from nbbn.accumulation import accumulate
from nbbn.call.gradients import Gradients
from nbbn.core.options import Options
from nbbn.deploy.inspection import explain, force
from nbbn.deploy.warming import warmup
from nbbn.engine.base import Force
from nbbn.engine.dispatcher import Dispatcher
from nbbn.layer.folding import fold_into
from nbbn.layer.layer import BatchNormalization
from nbbn.moments import Moments
from nbbn.population import population_statistics
from nbbn.runtime import buffers
from nbbn.sync.layer import SyncBatchNormalization

__version__ = "0.1.0"

load = BatchNormalization.load

__all__ = [
    "BatchNormalization",
    "Dispatcher",
    "Force",
    "Gradients",
    "Moments",
    "Options",
    "SyncBatchNormalization",
    "accumulate",
    "buffers",
    "constraints",
    "exchange",
    "explain",
    "fold_into",
    "force",
    "initializers",
    "load",
    "nn",
    "population_statistics",
    "regularizers",
    "sync",
    "warmup",
]
