"""What one attempt at a task left: token ids, which of them the policy wrote, and what the environment counted."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxlm.core.files import replacing
from jaxlm.rl.env import EnvState


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One attempt. `ids` is the prompt, then sampled and observed tokens in turn, as the model saw them.

        prompt        sampled           observed               sampled
        ids           5 6 7 8   9 4 2   3 1 1 8 3 5            7 7 2
        sampled       0 0 0 0   1 1 1   0 0 0 0 0 0            1 1 1
    """

    group: int                 # number of the prompt in its batch
    sample: int                # number among the attempts at it
    task: int                  # number of the task in its list
    ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]  # of the sampler, before truncation; 0 where not sampled
    kept: tuple[float, ...]      # mass that truncation left; 1 where not sampled
    turns: tuple[str, ...]         # texts of the policy's turns, without the token that ended them
    observations: tuple[tuple[str, ...], ...]  # what the calls of a turn brought back, the last one's too
    ended: bool                # the last turn came to its end of text, and no budget cut the attempt short
    env: EnvState

    def num_sampled(self) -> int:
        """Tokens that the policy wrote."""
        return sum(self.sampled)


def groups_of(episodes: Sequence[Episode]) -> list[list[int]]:
    """The places in the list of the attempts at each prompt, prompts in order of their first attempt."""
    found: dict[int, list[int]] = {}
    for place, one in enumerate(episodes):
        found.setdefault(one.group, []).append(place)
    return list(found.values())


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """The episode as plain JSON values."""
    return {**asdict(episode), "env": episode.env.to_json()}


def episode_from_json(values: Mapping[str, Any]) -> Episode:
    """The inverse of `episode_to_json`."""
    lists = ("ids", "sampled", "logprobs", "kept", "turns")
    return Episode(**{**values, **{name: tuple(values[name]) for name in lists},
                      "observations": tuple(map(tuple, values["observations"])),
                      "env": EnvState.from_json(values["env"])})


def save_episodes(path: Path, episodes: Sequence[Episode], head: Mapping[str, Any]) -> None:
    """Writes JSONL that begins with `head`; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for record in [{**head, "episodes": len(episodes)}, *map(episode_to_json, episodes)]:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_episodes(path: Path) -> tuple[dict[str, Any], list[Episode]]:
    """The head and the episodes of a file of `save_episodes`; ValueError if it is damaged."""
    try:
        head, *records = (json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        episodes = [episode_from_json(one) for one in records]
        if head["episodes"] != len(episodes):
            raise ValueError(f"it holds {len(episodes)} of {head['episodes']} episodes")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return head, episodes
