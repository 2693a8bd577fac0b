"""From a wish in a few words to a steering that was chosen and measured, in one call."""

from trimtab.wishes.left import slug
from trimtab.wishes.made import Made
from trimtab.wishes.making import make
