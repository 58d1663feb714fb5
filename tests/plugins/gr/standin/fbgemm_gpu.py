"""An empty module: the stand-in beside needs none of fbgemm's operators."""
