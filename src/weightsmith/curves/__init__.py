"""Curves through models, and what is measured along them: lines, polygons, planes."""
