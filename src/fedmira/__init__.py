"""FedMira: federated multi-task fine-tuning of language models with LoRA.

One frozen base model, one adapter per client; only adapters travel, and a server pulls the adapters of similar clients
together (MIRA). Everything public is here; see the README for the command line.
"""

from fedmira.adapters import Adapters, Layout
from fedmira.config.sections import Config
from fedmira.errors import FedMiraError
from fedmira.methods.base import Method
from fedmira.study.face import Run, Study, export, load_config, load_method, load_run, methods, report, resume, run

__all__ = [
    "Adapters",
    "Config",
    "FedMiraError",
    "Layout",
    "Method",
    "Run",
    "Study",
    "export",
    "load_config",
    "load_method",
    "load_run",
    "methods",
    "report",
    "resume",
    "run",
]
