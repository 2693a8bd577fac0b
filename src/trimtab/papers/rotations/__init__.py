"""Selective Steering: directions, planes, angles, layers."""
