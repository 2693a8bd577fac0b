"""Conversations under steerings: with a model in memory, or behind an address"""

from trimtab.chat.answers import Answer, Asked, Cost, Put, Receipt, Speaker
from trimtab.chat.commands import Face, LeaveError, obey
from trimtab.chat.editor import typed_lines
from trimtab.chat.local import Local
from trimtab.chat.plain import Plain, joined
from trimtab.chat.remote import Remote
from trimtab.chat.screen import Screen
from trimtab.chat.session import Session, Turn
