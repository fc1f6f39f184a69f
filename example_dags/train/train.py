"""Fits a line to temperatures, and writes it as JSON."""

import argparse
import json

from features import read_temperatures

parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--rows", type=int, required=True)
parser.add_argument("--model", required=True)
options = parser.parse_args()

hours, celsius = read_temperatures(options.data, options.rows)
print(f"Fitting a line to {len(hours)} hours")
mean_hour, mean_celsius = sum(hours) / len(hours), sum(celsius) / len(celsius)
covariance = sum((hour - mean_hour) * (degree - mean_celsius) for hour, degree in zip(hours, celsius, strict=True))
slope = covariance / sum((hour - mean_hour) ** 2 for hour in hours)
model = {"slope": slope, "intercept": mean_celsius - slope * mean_hour}
print("Model:", model)
with open(options.model, "w") as file:
    json.dump(model, file)
