"""Which tests run in which of CI's rounds.

    pytest                          Python 3.11, the README's command: all without the marker `breadth`
    pytest -m "breadth and once"    Python 3.11
    pytest -m "not once"            Python 3.12 and so a later JAX: `breadth` too

Everything runs at least once, and what is in neither table on both. `pytest -m ""` runs everything in one. An entry is
a file, or a test of it, with or without its parameters.
"""

# Long files without a slow test: they start first.
LONG = ("test_conformance", "test_mosaic_interpret", "test_strategies", "test_transforms")

# A worker runs whole files, so that what the tests of a file share is compiled once. Long files are split, so that no
# worker is left alone with one. Of these a worker runs all tests of one name:
BY_NAME = ("test_offsets", "test_poison", "test_strategies", "test_transforms")
# Of these all tests of one set of parameters, which share a program:
BY_PARAMETERS = ("test_conformance",)
# Of these, whose tests share nothing, one test at a time:
ONE_BY_ONE = ("test_gpu_ring", "test_inspect_compile", "test_mosaic_interpret", "test_tpu_kernel", "test_tpu_ring")

# One more combination of what other tests hold each by itself, and what is compiled for machines that are not there.
BREADTH = (
    "test_bench_ring::test_strategies_and_peers_on_four_devices_compute_the_same",
    "test_bench_tpu::test_backward_beats_splash_by_five_percent",
    "test_bench_tpu::test_every_estimate_is_possible",
    "test_bench_tpu::test_forward_cycles",
    "test_bench_tpu::test_one_token_takes_no_longer_than_reading_the_cache",
    "test_conformance::test_bfloat16_error_does_not_grow_with_the_ring",
    "test_conformance::test_default_blocks",
    "test_conformance::test_extreme_scale",
    "test_conformance::test_loops_and_unrolled_hops",
    "test_conformance::test_lowers_for_a_gpu",
    "test_conformance::test_scales_that_are_no_ordinary_ones",
    "test_conformance::test_sentinel_positions",
    "test_conformance::test_sixteen_bit_gradients_on_the_wire",
    "test_conformance::test_uneven_blocks",
    "test_conformance::test_wide_stripes",
    "test_decoder::test_on_a_mesh_with_data_and_tensor_axes",
    "test_decoder_options::test_options_equal_dense",
    "test_evaluation::test_token_losses",
    "test_gpu_ring",
    "test_inspect_compile",
    "test_inspect_promises::test_compiled_for_tpus_only_what_both_promises_allow_travels",
    "test_jaxpr::test_a_full_ring_rotates_once_less_than_it_has_devices",
    "test_linen::test_on_a_mesh_with_data_and_tensor_axes",
    "test_memory",
    "test_mosaic_backward::test_lowers",
    "test_mosaic_forward::test_lowers",
    "test_nnx::test_equals_dense[everything learned]",
    "test_nnx::test_equals_dense[window]",
    "test_poison::test_each_query_sees_what_it_attends",
    "test_poison::test_fully_masked_rows",
    "test_promises::test_results_are_those_without_it",
    "test_promises::test_under_jit_nothing_is_known_unless_jax_is_to_check",
    "test_properties::test_any_mask",
    "test_properties::test_any_other_problem",
    "test_readme::test_inspect_says_what_the_readme_shows",
    "test_strategies::test_as_users_compile",
    "test_strategies::test_axes_of_vmap",
    "test_strategies::test_bfloat16",
    "test_strategies::test_equals_the_oracle",
    "test_strategies::test_inside_shard_map_under_transforms",
    "test_strategies::test_interpreted_kernels",
    "test_strategies::test_windows_that_reach_over_parts_of_shards",
    "test_torus::test_a_part_of_every_block_on_each_ring",
    "test_tpu_kernel::test_every_feature_compiles_for_every_generation",
    "test_tpu_kernel::test_no_races",
    "test_tpu_kernel::test_tiles_of_a_chip",
    "test_tpu_ring",
    "test_tpu_steps::test_a_list_holds_every_tile_of_its_chunk",
    "test_training_multihost",
    "test_training_packed::test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not",
    "test_training_resume::test_interrupted_run_has_the_bits_of_an_uninterrupted_one",
    "test_transforms::test_an_exported_batch_of_any_size_on_one_device",
    "test_transforms::test_checkpoint_names_spare_the_second_ring",
    "test_transforms::test_padding_that_fills_whole_chunks",
    "test_transforms::test_vmap_of_the_whole_call",
    "test_transforms::test_vmap_over_stacked_shards_is_a_ring",
    "test_triton::test_lowers_for_cuda",
    "test_tune::test_candidates_lower",
    "test_visits::test_rows_visit_every_pair_once_and_full_tiles_are_full",
    "test_visits::test_tile_kinds_never_lie",
)

# Files, commands, names, and what numpy computes: no version of JAX changes them.
ONCE = (
    "test_adapters",
    "test_bench_gpu",
    "test_bench_ring",
    "test_bench_tpu::test_cases_fit_the_sequence",
    "test_bench_tpu::test_command_refuses",
    "test_bench_tpu::test_command_writes_the_table",
    "test_bench_tpu::test_floor",
    "test_cache::test_a_prompt_fills_a_cache_as_its_tokens_would_one_by_one",
    "test_cache::test_a_window_keeps_only_what_it_needs",
    "test_cache::test_rows_of_different_lengths_grow_in_place",
    "test_cache::test_what_is_not_cached_takes_part_in_nothing",
    "test_cli",
    "test_configs",
    "test_conformance::test_bfloat16_error_does_not_grow_with_the_ring",
    "test_conformance::test_default_blocks",
    "test_conformance::test_extreme_scale",
    "test_conformance::test_float64",
    "test_conformance::test_half_precision_and_the_same_bits_on_two_runs",
    "test_conformance::test_head_sizes_and_lengths_that_no_tile_divides",
    "test_conformance::test_loops_and_unrolled_hops",
    "test_conformance::test_scales_that_are_no_ordinary_ones",
    "test_conformance::test_sentinel_positions",
    "test_conformance::test_sixteen_bit_gradients_on_the_wire",
    "test_conformance::test_the_matrix_holds_every_pair",
    "test_conformance::test_uneven_blocks",
    "test_conformance::test_wide_stripes",
    "test_deal",
    "test_decoder",
    "test_decoder_options",
    "test_demo",
    "test_docs",
    "test_evaluation",
    "test_examples",
    "test_faces",
    "test_generate",
    "test_gpu",
    "test_hopper",
    "test_house",
    "test_inspect",
    "test_inspect_order",
    "test_inspect_promises",
    "test_inspect_strategies",
    "test_jaxpr",
    "test_layering",
    "test_layout",
    "test_linen",
    "test_mask",
    "test_memory",
    "test_mesh",
    "test_models",
    "test_models_files",
    "test_models_gguf",
    "test_nnx",
    "test_offsets",
    "test_oracle",
    "test_packing",
    "test_packing_axes",
    "test_pairs",
    "test_partial",
    "test_planner",
    "test_planner_costs",
    "test_planner_documents",
    "test_poison",
    "test_promises::test_a_million_tokens_are_checked_fast",
    "test_promises::test_a_stripe_of_one_token_on_many_ranks_is_not_looked_at_token_by_token",
    "test_promises::test_arguments_of_the_check_are_named",
    "test_promises::test_as_users_compile",
    "test_promises::test_every_key_that_a_document_may_need_is_there",
    "test_promises::test_it_travels_as_under_a_window",
    "test_promises::test_layers_pass_promises_on",
    "test_promises::test_only_the_first_tokens_of_a_shard_travel",
    "test_promises::test_only_what_the_longest_document_needs_travels",
    "test_promises::test_results_are_those_without_it",
    "test_promises::test_shards_that_are_merged_travel_whole_or_not_at_all",
    "test_promises::test_shares_grow_inwards",
    "test_promises::test_the_check_is_that_of_every_pair_of_tokens",
    "test_promises::test_what_is_wrong_is_said_with_its_numbers",
    "test_properties",
    "test_readme",
    "test_recipes",
    "test_ring",
    "test_rope",
    "test_schedule",
    "test_smollm2",
    "test_strategies::test_as_users_compile",
    "test_strategies::test_bfloat16",
    "test_strategies::test_equals_the_oracle",
    "test_strategies::test_interpreted_kernels",
    "test_strategies::test_only_what_a_window_needs_travels",
    "test_strategies::test_the_square_holds_every_pair",
    "test_strategies::test_windows_that_reach_over_parts_of_shards",
    "test_targets::test_integers_keep_their_type",
    "test_targets::test_only_the_first_token_of_each_run_travels",
    "test_targets::test_shards_of_one_run",
    "test_targets::test_whole_numpy_arrays",
    "test_targets::test_wrong_arguments_are_named",
    "test_targets::test_wrong_arguments_inside_are_named",
    "test_tiles",
    "test_torus",
    "test_tpu_kernel::test_a_query_that_is_not_finite_spoils_no_other",
    "test_tpu_kernel::test_logits_far_from_zero",
    "test_tpu_kernel::test_tile_sizes_are_even_and_of_the_generation",
    "test_tpu_kernel::test_tiles_of_a_chip",
    "test_tpu_kernel::test_units_hold_all_queries_and_fit",
    "test_tpu_steps",
    "test_training_config",
    "test_training_damage",
    "test_training_data",
    "test_training_finetune",
    "test_training_multihost",
    "test_training_packed",
    "test_training_resume",
    "test_training_sources",
    "test_transforms::test_a_drop_in_for_jax_nn",
    "test_transforms::test_debug_infs_reports_the_log_sum_exp_of_a_query_without_keys",
    "test_transforms::test_debug_nans_finds_none_in_a_query_without_keys",
    "test_transforms::test_one_array_without_the_residual",
    "test_transforms::test_padding_that_fills_whole_chunks",
    "test_transforms::test_scan_over_layers",
    "test_transforms::test_without_jit",
    "test_tune",
    "test_visits",
)


def unit(node: str) -> str:
    """What of ``tests/test_x.py::test_y[z]`` a worker runs as a whole."""
    file, _, test = node.partition("::")
    stem = file.rpartition("/")[2].removesuffix(".py")
    if stem in ONE_BY_ONE:
        return node
    if stem in BY_PARAMETERS and "[" in test:
        return f"{file}[{test.partition('[')[2]}"
    return f"{file}::{test.partition('[')[0]}" if stem in BY_NAME else file


def listed(node: str, table: tuple[str, ...]) -> bool:
    """Whether ``tests/test_x.py::test_y[z]`` is in a table."""
    name = node.removeprefix("tests/").replace(".py::", "::", 1)
    file, _, test = name.partition("::")
    return not {file, name, f"{file}::{test.partition('[')[0]}"}.isdisjoint(table)
