"""Chats watched along a direction: what turns show of a behaviour, and which are alarms."""

from trimtab.monitoring.alarms import Baseline, Monitor
from trimtab.monitoring.chats import Answered, read_chats
from trimtab.monitoring.projecting import projections
from trimtab.monitoring.setting import fit_monitor
from trimtab.monitoring.watching import Monitoring, Turn, monitor
from trimtab.monitoring.writing import write_run
