"""What a part of the Client's calls needs of the Client that it is a part of.

House rules: as powerd.client.core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from powerd.client.transport import Transport

T = TypeVar("T")


class Calls(ABC):
    """The ways to ask, which the Client brings."""

    @property
    @abstractmethod
    def transport(self) -> Transport: ...

    @abstractmethod
    def guard(self, what: str, action: Callable[[], T], otherwise: Callable[[], T]) -> T: ...

    @abstractmethod
    def _ask(self, kind: type[T], what: str, method: str, path: str, body: object = None, **options: Any) -> T: ...

    @abstractmethod
    def _wait(self, wait_s: float) -> float | None: ...
