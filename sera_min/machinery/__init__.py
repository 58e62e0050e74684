"""What makes it a program: flags, reading data, models on disk, the run's folder, reports, memory.

Nothing of SeRA itself is here.
"""
