"""How generated dW lie to each other, and intervals for paired comparisons."""
