"""Exit codes: stable, documented in docs/cli.md."""

from __future__ import annotations

from vmitap import errors

OK = 0
NO = 1
USAGE = 2
ATTACH = 3
NOT_FOUND = 4
MEMORY = 5
NOT_SUPPORTED = 6
DRIVER = 7
HANDLER = 8
OTHER = 9
RECORDING = 10
INTERNAL = 70
INTERRUPTED = 130
PIPE = 141
TERMINATED = 143

_BY_KIND: dict[type[errors.VmitapError], int] = {
    errors.AttachError: ATTACH,
    errors.ImageError: ATTACH,
    errors.SymbolNotFoundError: NOT_FOUND,
    errors.VcpuNotFoundError: NOT_FOUND,
    errors.ViewNotFoundError: NOT_FOUND,
    errors.BreakpointNotFoundError: NOT_FOUND,
    errors.TranslationError: MEMORY,
    errors.OutOfRangeError: MEMORY,
    errors.NotInDumpError: MEMORY,
    errors.StringTooLongError: MEMORY,
    errors.NotSupportedError: NOT_SUPPORTED,
    errors.DriverError: DRIVER,
    errors.DomainGoneError: DRIVER,
    errors.UndoFailedError: DRIVER,
    errors.EventJournalError: RECORDING,
    errors.RecordingError: RECORDING,
    errors.HandlerError: HANDLER,
    errors.DeadlineExceededError: HANDLER,
    errors.InvalidArgumentError: USAGE,
}


def code_of(error: errors.VmitapError) -> int:
    """The exit code for an error of the package."""
    return _BY_KIND.get(type(error), OTHER)
