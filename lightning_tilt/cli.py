"""`lightning-tilt fit | validate | test | predict | configs | cite`: the wiring of LightningCLI, and nothing else.

Five blocks: `model: data: sampler: evaluation: trainer:`.  The model is any LightningModule that carries a loss, ours
or yours.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# Imported so that their short names resolve in YAML and on the command line.
import lightning_tilt.callbacks
import lightning_tilt.data
import lightning_tilt.models.closed_form
import lightning_tilt.models.equivariant
import lightning_tilt.models.gaussian_base
import lightning_tilt.models.lattice
import lightning_tilt.models.neural
import lightning_tilt.models.stable_diffusion
import lightning_tilt.models.stable_diffusion_3
import lightning_tilt.rewards
import lightning_tilt.rewards.energies
import lightning_tilt.rewards.mixture_density
import lightning_tilt.tasks  # noqa: F401
from lightning_tilt.callbacks import Evaluation, PredictionWriter, SteeredSampler, TrajectorySampler
from lightning_tilt.callbacks.home import goes_on_here
from lightning_tilt.checkpoints import last_checkpoint
from lightning_tilt.cli_checkpoint import changed_settings, saved_settings, with_checkpoint_first
from lightning_tilt.cli_configs import DESCRIPTION, without_a_run
from lightning_tilt.cli_errors import one_line, users_mistake
from lightning_tilt.cli_quiet import quieter
from lightning_tilt.loggers import RunLogger
from lightning_tilt.run_folder import keep_previous, need_writable, set_aside
from lightning_tilt.steering import SMC
from lightning_tilt.strategies import check_name

__all__ = ["SaveRun", "TiltCLI", "main"]


class TiltParser(LightningArgumentParser):
    """A parser whose errors are one line; abbreviated options are misspelt ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **{"prog": "lightning-tilt", **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and one line that names the culprit and the mend."""
        if not self.exit_on_error:  # one of several attempts: the outer parser reports
            super().error(message, ex)
        subcommands = [
            p for action in self._actions if isinstance(action.choices, dict) for p in action.choices.values()
        ]
        options = [o for parser in (self, *subcommands) for action in parser._actions for o in action.option_strings]
        sys.stderr.write(f"lightning-tilt: error: {one_line(message, options)}\n")
        raise SystemExit(2)


class SaveRun(SaveConfigCallback):
    """Save the resolved configuration in the run's folder, and the model's part of it in every checkpoint.

    That is done when a fit starts, after all set-up: what is refused there has touched nothing in the folder.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new run in a used folder moves the earlier one's outputs aside; one that goes on there adds to them."""
        folder = trainer.log_dir  # processes agree on it, so all of them ask
        if folder is None or self.already_saved:
            return
        if trainer.is_global_zero:
            kept = None if goes_on_here(trainer) else keep_previous(trainer.default_root_dir)
            if kept is not None:
                rank_zero_info(f"An earlier run was here; its outputs are now in {kept}")
            set_aside(Path(folder) / self.config_filename)
        super().setup(trainer, pl_module, "fit")  # writes the file, and lets no process run ahead

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Plain class paths and arguments: `load_from_checkpoint` and `--ckpt_path` rebuild the model from them."""
        checkpoint |= self._settings()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say which settings a fit that goes on has changed."""
        changed = changed_settings(checkpoint, self._settings())
        if changed and trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(f"this run goes on with other settings than its checkpoint's: {'; '.join(changed)}")

    def _settings(self) -> dict[str, Any]:
        return saved_settings(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))


class TiltCLI(LightningCLI):
    """LightningCLI with the sampler's block, a run folder, and flags that beat a checkpoint's hyperparameters."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": [PredictionWriter()]},
            save_config_callback=SaveRun,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=TiltParser,
            parser_kwargs={"description": DESCRIPTION},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Blocks of their own: the sampler, what a test evaluates, and steering, which is off unless asked for."""
        parser.add_lightning_class_args(TrajectorySampler, "sampler")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_argument(
            "--steering",
            type=Literal["none", "smc"],
            default="none",
            help="steer the samples of validate, test and predict without training: by sequential Monte Carlo",
        )
        parser.add_argument(
            "--dry_run",
            type=Literal["off", "memory", "prompts", "citation"],
            default="off",
            help="of a fit: print what it needs in memory and network evaluations, encode its prompts, or print what "
            "to cite, and end",
        )
        parser.add_class_arguments(SMC, "smc", skip={"scale", "micro_batch"})
        parser.set_defaults({"trainer.default_root_dir": "runs/latest"})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Let the model of a checkpoint come first, so that every YAML and every flag beats it."""
        given = list(sys.argv[1:] if args is None else args) if not isinstance(args, dict) else args
        if isinstance(given, list):
            given = with_checkpoint_first(_nulls_as_configs(given))
        self.config = parser.parse_args(given) if isinstance(given, list) else parser.parse_object(given)

    def _parse_ckpt_path(self) -> None:
        """Done in `parse_arguments`: here, last, the checkpoint would beat explicit flags."""

    def _run_subcommand(self, subcommand: str) -> None:
        """An interrupt of what the sampler does not see - reports, tests - ends in a line of this command's own."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            path, how = last_checkpoint(self.trainer), f"{subcommand} begins anew"
            if subcommand == "fit" and self.trainer.global_step > 0 and path is not None and path.exists():
                how = f"{self.trainer.global_step} updates are made: the same command and --ckpt_path {path} goes on"
            if self.trainer.is_global_zero:
                sys.stderr.write(f"\nlightning-tilt: stopped by SIGINT; {how}\n")
            raise SystemExit(128 + signal.SIGINT) from None

    def before_instantiate_classes(self) -> None:
        """End here where no run is asked for, or none could leave anything: nothing has been loaded yet."""
        wanted = self._get(self.config, "dry_run")
        if wanted == "off":
            need_writable(self._get(self.config, "trainer").default_root_dir or ".")
            if self.subcommand in ("validate", "test", "predict") and self._get(self.config, "ckpt_path") is None:
                rank_zero_info("No --ckpt_path: the model is as its config makes it, untrained by any run")
            return
        if self.subcommand != "fit":
            raise ValueError(f"--dry_run {wanted} is for fit")
        from lightning_tilt.cli_encode import dry_run

        print(dry_run(wanted, self.config["fit"].as_dict()))
        raise SystemExit(0)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Without another logger, metrics go to `metrics.csv` in the run's folder."""
        config = self.config[self.subcommand].trainer if self.subcommand else self.config.trainer
        check_name(config.strategy)
        if config.logger is None or config.logger is True:
            kwargs.setdefault("logger", RunLogger(config.default_root_dir))
        steering = self._get(self.config_init, "steering") == "smc"
        smc: SMC = self._get(self.config_init, "smc")
        unused = [] if steering else [f"--smc.{f.name}" for f in fields(smc) if getattr(smc, f.name) != f.default]
        if unused and self.subcommand != "fit":
            rank_zero_warn(f"{', '.join(unused)}: without --steering smc nothing is steered")
        if steering and self.subcommand == "fit":
            raise ValueError("--steering smc is for validate, test and predict: a fit trains on plain rollouts")
        if steering and smc.guided:
            kwargs["inference_mode"] = False  # the gradient of the twist
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        if steering:
            trainer.callbacks[:] = [  # type: ignore[attr-defined]
                SteeredSampler(c, smc) if isinstance(c, TrajectorySampler) else c
                for c in trainer.callbacks  # type: ignore[attr-defined]
            ]
        return trainer


def _nulls_as_configs(args: list[str]) -> list[str]:
    """Say `--model.predictor.height null` as a YAML would: of a null two classes deep jsonargparse makes a text."""
    given, rest = list[str](), list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        keys = [key for key in name.removeprefix("--").split(".") if key != "init_args"]
        deep = name.startswith(("--model.", "--data.")) and len(keys) > 2
        if deep and (value if equals else (rest or [""])[0]) == "null":
            if not equals:
                rest.pop(0)
            content: Any = None
            for key in reversed(keys[1:]):
                content = {"init_args": {key: content}}
            given += ["--config", yaml.safe_dump({keys[0]: content})]
        else:
            given.append(name + equals + value)
    return given


def main(args: Sequence[str] | None = None) -> None:
    """The console script; own rewards and modules are found in the working directory.

    A mistake that the user can mend is one line and exit status 1 (2 on the command line or in a YAML);
    `LIGHTNING_TILT_DEBUG=1` shows its traceback.
    """
    sys.path.insert(0, str(Path.cwd()))
    quieter()
    try:
        given = without_a_run(sys.argv[1:] if args is None else args)
        if given is not None:
            TiltCLI(given)
    except Exception as error:
        line = users_mistake(error)
        if line is None or os.environ.get("LIGHTNING_TILT_DEBUG", "0") != "0":
            raise
        sys.stderr.write(f"lightning-tilt: error: {line} (LIGHTNING_TILT_DEBUG=1 shows the traceback)\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
