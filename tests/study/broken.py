"""Federated averaging whose local step fails, in one of the ways in which a machine or a method may."""

import os
import signal
from typing import Literal

from fedmira.adapters import Adapters
from fedmira.errors import MethodError
from fedmira.methods.base import Client, Cohort, Memory, Message, Method, Settings, Tools
from fedmira.methods.means import change_nothing


class Config(Settings):
    """how: the process is killed, the method refuses, or memory is out."""

    how: Literal["killed", "refuses", "hungry"]


def build(config: Config, cohort: Cohort) -> Method:
    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        if config.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.how == "refuses":
            raise MethodError("not with these rows")
        raise MemoryError

    return Method("broken", change_nothing, client=Client(step=step))
