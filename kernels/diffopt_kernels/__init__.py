"""Launchers of fused kernels and their readable references; knows torch and triton only."""
