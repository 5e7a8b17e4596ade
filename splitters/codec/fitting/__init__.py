"""Fitting of what a codec ships with: intervals of the plain codec, tables of the learned one."""
