"""A few training steps for an adapter that was cut: on its rows, and under the adapter that it was before."""
