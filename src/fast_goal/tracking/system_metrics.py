"""What the machine does while a step runs: processor, memory, disk, network and GPUs, as MLflow's own monitors see them.

On by default; off with FAST_GOAL_SYSTEM_METRICS=0 or MLflow's MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false. MLflow's variables
MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL (seconds) and MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING hold here too.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

INTERVAL = 10.0  # seconds, MLflow's own
SHORTEST = 0.5  # seconds; the load of less says nothing
SWITCHES = ("FAST_GOAL_SYSTEM_METRICS", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
Record = Callable[[Mapping[str, float], int], None]
_log = logging.getLogger(__name__)


class SystemMetrics:
    """Hands `system/...` numbers, and the number of the sample, to `record` from the start until `stop`, in the background.

    MLflow's SystemMetricsMonitor is not used: it asks the store at every sample, ends for good when that is away once, and
    holds up the end of the run meanwhile. Nothing that fails here reaches the step; it is said once.
    """

    def __init__(self, record: Record):
        self._record = record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        if any(os.environ.get(name, "").lower() in ("0", "false") for name in SWITCHES):
            return
        try:
            self._monitors, self._interval, self._samples = _monitors(), *_pace()
        # Any error: what the monitors' libraries raise on an odd machine, and a variable that MLflow cannot read
        except Exception as error:
            self._say(error)
            return
        self._thread.start()

    def stop(self) -> None:
        """Ends the recording, with a last sample."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._collect()  # the processor's load is that since the last look
            self._clear()
            number, count, begin, ended = 0, 0, time.monotonic(), False
            while not ended:
                ended = self._stop.wait(self._interval)
                if time.monotonic() - begin < SHORTEST:
                    continue
                self._collect()
                count, begin = count + 1, time.monotonic()
                if count == self._samples or ended:
                    values = {name: value for monitor in self._monitors for name, value in monitor.aggregate_metrics().items()}
                    self._record({f"system/{name}": value for name, value in values.items()}, number)
                    self._clear()
                    number, count = number + 1, 0
        except Exception as error:  # as above
            self._say(error)

    def _collect(self) -> None:
        for monitor in self._monitors:
            monitor.collect_metrics()

    def _clear(self) -> None:
        for monitor in self._monitors:
            monitor.clear_metrics()

    @staticmethod
    def _say(error: Exception) -> None:
        _log.warning("System metrics are not recorded from here on: %s: %s", type(error).__name__, error)


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
        found.append(GPUMonitor())
    return found


def _pace() -> tuple[float, int]:
    """Seconds between two samples, and how many of them are recorded as one."""
    from mlflow.environment_variables import (
        MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING,
        MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
    )

    return MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL, MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
