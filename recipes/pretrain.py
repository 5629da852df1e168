"""Pretrain a bilingual decoder from text to checkpoint.

Reproduces the pretraining of KORMo (arXiv 2510.09426) at any scale: tokenizer, mixture, packing with an
intra-document mask, AdamW with warmup-stable-decay, held-out bits per byte and greedy samples while it trains.

    python -m recipes.pretrain --preset smoke                    embedded data, 2 CPU cores, about 2 minutes
    python -m recipes.pretrain --preset smoke --data.path my.jsonl.gz --optim.lr 1e-3
    python -m recipes.pretrain --config runs/pretrain/config.json --resume

Results and exact commands: docs/results.md. Left out: the stages after stage 1.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core import config as flags
from jaxlm.core.batch import LMBatch
from jaxlm.core.log import MetricLog, setup_logging
from jaxlm.core.masked import Mean, aggregate
from jaxlm.core.mesh import MeshConfig, make_mesh
from jaxlm.core.rng import derive
from jaxlm.core.tree import count_parameters
from jaxlm.data.pipeline import PipelineConfig, eval_batches, make_pipeline
from jaxlm.data.sources import SourceConfig, open_source, parse_source
from jaxlm.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_sentencepiece
from jaxlm.eval.likelihood import bits_per_byte
from jaxlm.generate.decode import greedy_decode, left_pad
from jaxlm.model.config import ComputeConfig, ModelConfig, flops_per_token
from jaxlm.model.decoder import Model, build
from jaxlm.model.partition import PARAM_RULES
from jaxlm.model.presets import MODELS
from jaxlm.objective.lm import chunked_cross_entropy
from jaxlm.optim.optimizer import OptimConfig, make_optimizer
from jaxlm.optim.schedule import ScheduleConfig, make_schedule
from jaxlm.train.checkpoint import CheckpointConfig, Checkpointer
from jaxlm.train.curves import plot_curves
from jaxlm.train.loop import LoopConfig, NonFiniteError, fit
from jaxlm.train.measure import peak_flops
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import check_batch, make_step

log = logging.getLogger(__name__)
