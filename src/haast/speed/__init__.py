"""Making a forward pass cheap: packed linears, static shapes, and the measured costs that choose a tree."""
