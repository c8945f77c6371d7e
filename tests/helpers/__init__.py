"""What several tests need and what says nothing about right results.

Processes and threads to run code in, a workload for them, two sets of small examples, and a reader of PTX.
"""
