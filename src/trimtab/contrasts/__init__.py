"""Contrasting texts: where a steering comes from."""

from trimtab.contrasts.checking import MISTAKES, SINGLE, Checked, Finding, check, columns
from trimtab.contrasts.contrast import Contrast, builtins, check_contrast, made_beside
from trimtab.contrasts.files import TABLES, meant_file, read_table
from trimtab.contrasts.held_out import plain, shared_rows
from trimtab.contrasts.images import Image, read_image
from trimtab.contrasts.rows import (
    PARTS,
    Content,
    Conversation,
    Pair,
    Part,
    Prompt,
    Text,
    as_messages,
    images_in,
    in_words,
    last_message,
    read_prompt,
    spread,
)
