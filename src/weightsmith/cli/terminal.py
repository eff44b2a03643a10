"""Text from files, made safe to print: a name can hold what moves the cursor, hides text or types for the user."""

from __future__ import annotations

# Of one message; what says more has copied a file into it.
_LONGEST = 4_000


def printable(text: str) -> str:
    """Return a text with everything escaped that a terminal would not just show, and cut if it is very long.

    That is every control character (escape sequences and line breaks with them), marks that turn the direction of
    writing, invisible letters, and halves of characters, which cannot be printed at all.
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} … and {len(text) - _LONGEST:,} characters more"
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
