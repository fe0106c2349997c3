"""Several runs side by side on one frozen base: their rows share each training pass through it.

Each run is an ordinary one, with its own components, optimizer, schedule and folder, and walks as it would alone. It
waits in one place: where the gradient of a micro-batch is to be computed. When all runs wait there, one pass is made
for all of their rows.

    turns    the runs take turns: exactly one of them, or the pass for all, computes at any time
    base     one frozen base, and a model for each run that is made of its weights
    joint    the pass for the rows of several runs
    batch    their micro-batches as one, and which of them go together
    layer    a layer of the base under the components of several runs
"""
