"""Export of trained networks to other runtimes: conversion, comparison with the checkpoint, inference."""
