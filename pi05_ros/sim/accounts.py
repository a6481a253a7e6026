"""Whether every injected fault is found again in /diagnostics: what must be counted, and what the node counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray

from pi05_ros.runtime.mailbox import Mailbox

# Refusals that concern a message, a request or a thread, and no set of inputs that was taken.
NO_SET = {"missing joint", "joint count", "non-finite joint", "implausible joint", "wire format", "future stamp",
          "pinned memory", "parameter", "worker stuck", "WorkerError"}
FATES = ("", " repeated", " out of order", " forgotten", " fallen silent")  # of a frame that is not taken
CAUSES = {"encoding": "refused.encoding", "size": "refused.image size"}  # of a damaged picture, where it is decoded
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Account:
    """An equality: a counter of /diagnostics, and between what it must lie for the faults named."""

    faults: str
    counter: str
    low: int
    high: int
    found: int

    def __add__(self, other: Account) -> Account:
        return Account(self.faults, self.counter, self.low + other.low, self.high + other.high,
                       self.found + other.found)

    @property
    def holds(self) -> bool:
        return self.low <= self.found <= self.high


def counts_of(message: DiagnosticArray) -> dict[str, int]:
    """All whole numbers of a report."""
    return {pair.key: int(pair.value) for status in message.status for pair in status.values if pair.value.isdecimal()}


def conservation(counts: Counts, cameras: Mapping[str, str], future: Mapping[str, int] | None = None,
                 open_sets: int = 1) -> list[Account]:
    """Nothing vanishes: frames received are taken, dropped by a cause, refused or (one a camera) wait to be read; sets
    taken are published, refused, or dropped with their activation (all but `open_sets` in the making).

    Args:
        cameras: topic of each slot.
        future: how many of its frames were refused for their stamp; None: unknown, so that all may have been.
    """
    refused = {key.removeprefix("refused."): n for key, n in counts.items() if key.startswith("refused.")}
    out = []
    for slot, topic in cameras.items():
        gone = counts.get(f"taken.{slot}", 0) + sum(counts.get(f"dropped.{slot}{fate}", 0) for fate in FATES)
        low, high = (0, refused.get("future stamp", 0)) if future is None else (future.get(slot, 0),) * 2
        out.append(Account("all", f"received.{topic} less taken and dropped", low, high + 1,
                           counts.get(f"received.{topic}", 0) - gone))
    of_sets = sum(n for cause, n in refused.items() if cause not in NO_SET and not cause.startswith("unusable"))
    ended = counts.get("dropped.activation ended", 0) + counts.get("dropped.failed with another", 0)
    accounted = counts.get("chunks", 0) + of_sets + ended
    out.append(Account("all", "taken.state less published, refused and ended", 0, open_sets,
                       counts.get("taken.state", 0) - accounted))
    return out


class Accounts:
    """What one process must count; `expected` and `at_most` by counter."""

    def __init__(self) -> None:
        self.expected: Counter[str] = Counter()
        self.at_most: Counter[str] = Counter()
        self.future: Counter[str] = Counter()  # frames from the future, by slot
        self._faults: dict[str, str] = {}

    def must(self, counter: str, faults: str, times: int = 1) -> None:
        self.expected[counter] += times
        self._faults[counter] = faults

    def may(self, counter: str, faults: str) -> None:
        """One more at most."""
        self.at_most[counter] += 1
        self._faults[counter] = faults

    def message(self, topic: str, slot: str, stamp_ns: int, now_ns: int, mailbox: Mailbox, damage: str = "") -> None:
        """One is about to be delivered. `damage`: the cause for which it is refused on arrival."""
        self.must(f"received.{topic}", "drop, silence, second_publisher")
        held = mailbox.latest(slot)
        if damage:
            self.must(f"refused.{damage}", "not_a_number, missing_joint")
        elif (stamp_ns - now_ns) * 1e-9 > mailbox.limits.max_skew_s:
            self.must("refused.future stamp", "clock_jump")
            self.future[slot] += 1
        elif held is not None and stamp_ns < held.stamp_ns:
            self.must(f"dropped.{slot} out of order", "delay, reorder, clock_jump")
        elif held is not None and stamp_ns == held.stamp_ns:
            self.must(f"dropped.{slot} repeated", "duplicate, second_publisher")

    def compare(self, counts: Counts, cameras: Mapping[str, str]) -> list[Account]:
        found = [Account(self._faults[key], key, n, n, counts.get(key, 0)) for key, n in self.expected.items()]
        found += [Account(self._faults[key], key, 0, n, counts.get(key, 0)) for key, n in self.at_most.items()]
        return found + conservation(counts, cameras, self.future)


def broken(accounts: Iterable[Account]) -> list[str]:
    return [f"{a.counter}: {a.found} in /diagnostics, expected {span(a)} ({a.faults})" for a in accounts if not a.holds]


def span(account: Account) -> str:
    return f"{account.low}" if account.low == account.high else f"{account.low} to {account.high}"


def wire_accounts(counts: Counts, sent: Mapping[str, int]) -> list[Account]:
    """Of a process of its own: no more than was sent to it (a message may be lost on the way, one that was refused may
    stand in the next report), and what its policy says was injected there.

    Args:
        sent: messages by topic, damaged ones by the kind of damage, parameters that were refused.
    """
    damage = {"encoding": CAUSES["encoding"], "size": CAUSES["size"], "missing joint": "refused.missing joint",
              "non-finite joint": "refused.non-finite joint"}
    out = [Account("drop, silence", f"received.{topic}", 0, sent[topic], counts.get(f"received.{topic}", 0))
           for topic in ("joint_states", "left_wrist_image", "right_wrist_image")]  # base_image has a foreign publisher
    out += [Account("damage", key, 0, sent[kind], counts.get(key, 0)) for kind, key in damage.items()]
    for key in ("inference failed", "CUDA out of memory"):
        made = counts.get(f"injected.refused.{key}")
        if made is not None:  # the policy is there; its last failure may be on the way to the node's thread
            out.append(Account("worker_exception", f"refused.{key}", made - 1, made, counts.get(f"refused.{key}", 0)))
    return out
