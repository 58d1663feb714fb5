from REC.evaluator.evaluator import DataStruct, Evaluator

__all__ = ["DataStruct", "Evaluator"]
