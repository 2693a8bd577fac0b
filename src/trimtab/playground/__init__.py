"""A page in the browser to play with steerings: chat, curves, making, what is inside, runs"""

from trimtab.playground.guard import Access
from trimtab.playground.pages import application
from trimtab.playground.place import Playground
from trimtab.playground.shelf import Shelf
