"""Several processes that train one model: who they are, and what they tell each other."""

from halfbyte.distributed.joining import current_world, enter_world, join_world, leave_world, num_ranks
from halfbyte.distributed.world import ALONE, World, WorldError

__all__ = ["ALONE", "World", "WorldError", "current_world", "enter_world", "join_world", "leave_world", "num_ranks"]
