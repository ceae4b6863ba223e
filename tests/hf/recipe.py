"""The recipe that people already have, with only its import lines changed. Arguments: model, data set.

The names and the order of the calls are the recipe's own; nothing here is written for halfbyte.
"""

import sys

import torch

from halfbyte.hf import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LoraConfig,
    PeftModel,
    SFTTrainer,
    TrainingArguments,
    get_peft_model,
    load_dataset,
    prepare_model_for_kbit_training,
)

model_id, dataset_name = sys.argv[1:3]

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=bnb_config, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token

model = prepare_model_for_kbit_training(model)
lora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
peft_model = get_peft_model(model, lora_config)
peft_model.print_trainable_parameters()

dataset = load_dataset(dataset_name, split="train")

training_args = TrainingArguments(
    output_dir="./results",
    num_train_epochs=3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    optim="paged_adamw_8bit",
    learning_rate=2e-4,
    fp16=False,
    bf16=True,
    max_grad_norm=0.3,
    warmup_ratio=0.03,
    group_by_length=True,
    lr_scheduler_type="cosine",
    logging_steps=50,
    save_steps=500,
)
trainer = SFTTrainer(
    model=peft_model,
    train_dataset=dataset,
    peft_config=lora_config,
    dataset_text_field="text",
    max_seq_length=1024,
    tokenizer=tokenizer,
    args=training_args,
    packing=False,
)
trainer.train()

base_model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=bnb_config, device_map="auto")
tuned_model = PeftModel.from_pretrained(base_model, "./results/adapter_model.bin")
inputs = tokenizer("How do I", return_tensors="pt")
outputs = tuned_model.generate(**inputs, max_new_tokens=8)
print("answer:", tokenizer.decode(outputs[0], skip_special_tokens=True))
merged_model = tuned_model.merge_and_unload()
print("merged:", sorted({str(p.dtype) for p in merged_model.parameters()}))
